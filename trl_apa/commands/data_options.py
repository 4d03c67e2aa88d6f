"""Options about data sets and their rows. Imports nothing heavy, so that `--help` answers at once."""

from dataclasses import dataclass

from trl_apa.commands.mixture import entries_of, shown_name
from trl_apa.config.fields import option
from trl_apa.data.layouts import LAYOUTS


@dataclass
class DataArguments:
    """Which rows a command reads."""

    dataset_name: str | None = option(None, "A file (json, jsonl, both also .gz, csv, parquet) or a hub data set.")
    dataset_config: str | None = option(None, "Configuration of a hub data set.")
    dataset_data_dir: str | None = option(None, "Folder inside a hub data set.")
    dataset_layout: str | None = option(
        None, f"Columns of a data set that are not called prompt, chosen, ...: {', '.join(LAYOUTS)}."
    )
    dataset_streaming: bool = option(
        False, "Read no more of a hub data set than max_train_rows and max_eval_rows, which it needs."
    )
    datasets: list[str] | None = option(
        None,
        "Data sets read one after the other, in place of dataset_name: names, files, or TRL's DatasetConfig as JSON.",
    )
    streaming: bool = option(False, "As dataset_streaming, of datasets.")
    test_split_size: float | None = option(None, "As eval_share, of datasets.")
    dataset_train_split: str = option("train", "Split of a hub data set that is trained on.")
    dataset_test_split: str | None = option(None, "Split of a hub data set that is evaluated on.")
    eval_dataset_name: str | None = option(None, "Held-out rows that are not in dataset_name: a file or a data set.")
    eval_dataset_data_dir: str | None = option(
        None, "Folder inside the hub data set eval_dataset_name; dataset_data_dir by default."
    )
    eval_share: float | None = option(
        None, "Hold out this share of dataset_name's rows: the same in every command, a dialogue never in both parts."
    )
    max_train_rows: int | None = option(None, "Train on so many rows at most.")
    max_eval_rows: int | None = option(None, "Evaluate on so many rows at most.")
    dataset_prompt_column: str | None = option(
        None, "Column with the prompt. By default prompt, query, input_ids, or what comes before chosen's last turn."
    )

    def __post_init__(self) -> None:
        if self.dataset_layout not in (None, *LAYOUTS):
            raise ValueError(f"dataset_layout={self.dataset_layout!r}: it should be one of {', '.join(LAYOUTS)}")
        for name in ("max_train_rows", "max_eval_rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it should be at least 1")
        self._check_mixture()
        self._check_held_out()

    def _check_mixture(self) -> None:
        """See that options of `datasets` and of `dataset_name` do not meet."""
        if self.datasets is None:
            for name, other in (("streaming", "dataset_streaming"), ("test_split_size", "eval_share")):
                if getattr(self, name):
                    raise ValueError(f"{name}={getattr(self, name)} is of datasets; of dataset_name it is {other}")
            return
        entries_of(self.datasets)
        for name in ("dataset_name", "dataset_config", "dataset_data_dir", "dataset_streaming"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} and datasets both say which rows are read: set one of them"
                )
        if self.test_split_size is not None and self.eval_share is not None:
            raise ValueError("test_split_size and eval_share both set the held-out rows: set one of them")
        if self.test_split_size is not None:
            self.eval_share = self.test_split_size
        if self.dataset_test_split == "test" and self.eval_share is not None:
            self.dataset_test_split = None  # so TRL calls what test_split_size holds out
        if self.dataset_test_split is not None and self.eval_dataset_name is None:
            raise ValueError(
                f"dataset_test_split={self.dataset_test_split!r} is of dataset_name; of datasets, test_split_size or "
                "eval_dataset_name set the held-out rows"
            )

    def _check_held_out(self) -> None:
        share = self.share_name
        if self.eval_share is not None and not 0 < self.eval_share < 1:
            raise ValueError(f"{share}={self.eval_share}: it should be between 0 and 1")
        given = [name for name in ("eval_dataset_name", share) if getattr(self, name) is not None]
        if self.dataset_test_split is not None and share in given:
            given.append("dataset_test_split")
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both set the held-out rows: set one of them")
        if self.eval_dataset_data_dir is not None and self.eval_dataset_name is None:
            raise ValueError(
                f"eval_dataset_data_dir={self.eval_dataset_data_dir!r} is read only with eval_dataset_name"
            )

    @property
    def share_name(self) -> str:
        """The option that `eval_share` was given by."""
        return "eval_share" if self.test_split_size is None else "test_split_size"

    @property
    def names(self) -> list[str]:
        """Of the data sets that are trained on, as they were given."""
        of_mixture = [] if self.datasets is None else [shown_name(entry) for entry in entries_of(self.datasets)]
        return of_mixture + ([] if self.dataset_name is None else [self.dataset_name])

    @property
    def source(self) -> str:
        """What messages call the rows.

        Raises:
            ValueError: without `dataset_name` and `datasets`.
        """
        if self.datasets is not None:
            return ", ".join(self.names)
        if self.dataset_name is None:
            raise ValueError("dataset_name is not set: name a file or a data set of the hub")
        return self.dataset_name
