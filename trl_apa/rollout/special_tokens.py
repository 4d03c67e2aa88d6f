"""The ids that mean something in rollouts whatever the text."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from trl_apa.models.network_parts import Network, pad_token_id_of, padding_id
from trl_apa.rollout.generation import decoder_start_token_id, end_token_ids


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that end, begin and pad the rows of a trainer.

    Args:
        pad: what micro-batches are padded with; every network has a row for it.
        ends: what ends a response, kept as its last token; may be empty.
        decoder_start: what the decoder of an encoder-decoder reads before a response; None for a decoder alone.
    """

    pad: int
    ends: list[int]
    decoder_start: int | None = None

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        policy: Network,
        readers: Sequence[Network],
        stop_token_id: int | None = None,
    ) -> "SpecialTokens":
        """Those of a tokenizer and a policy.

        Args:
            tokenizer: with a pad or an EOS token.
            policy: whose generation config may name more ends.
            readers: every network that reads the rows, the policy too.
            stop_token_id: the only end, if given.

        Raises:
            ValueError: if an encoder-decoder's config does not say what its decoder starts with.
        """
        return cls(
            pad=padding_id(pad_token_id_of(tokenizer), readers),
            ends=end_token_ids(policy, tokenizer, stop_token_id),
            decoder_start=decoder_start_token_id(policy),
        )
