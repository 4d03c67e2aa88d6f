"""The paper of each algorithm, as a model card cites it."""

from typing import NamedTuple


class Paper(NamedTuple):
    """An entry of a bibliography.

    Args:
        label: of BibTeX.
        title, authors, year: of the paper.
        arxiv: its number there.
    """

    label: str
    title: str
    authors: str
    year: int
    arxiv: str

    @property
    def bibtex(self) -> str:
        """The entry."""
        return (
            f"@article{{{self.label},\n"
            f"    title = {{{{{self.title}}}}},\n"
            f"    author = {{{self.authors}}},\n"
            f"    year = {self.year},\n"
            f"    journal = {{arXiv preprint arXiv:{self.arxiv}}}\n"
            "}"
        )


APA = Paper(
    "zhu2023apa",
    "Fine-Tuning Language Models with Advantage-Induced Policy Alignment",
    "Banghua Zhu and Hiteshi Sharma and Felipe Vieira Frujeri and Shi Dong and Chenguang Zhu and Michael I. Jordan "
    "and Jiantao Jiao",
    2023,
    "2306.02231",
)
AWR = Paper(
    "peng2019awr",
    "Advantage-Weighted Regression: Simple and Scalable Off-Policy Reinforcement Learning",
    "Xue Bin Peng and Aviral Kumar and Grace Zhang and Sergey Levine",
    2019,
    "1910.00177",
)
PPO = Paper(
    "schulman2017ppo",
    "Proximal Policy Optimization Algorithms",
    "John Schulman and Filip Wolski and Prafulla Dhariwal and Alec Radford and Oleg Klimov",
    2017,
    "1707.06347",
)
GRPO = Paper(
    "shao2024deepseekmath",
    "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
    "Zhihong Shao and others",
    2024,
    "2402.03300",
)
CISPO = Paper(
    "minimax2025m1",
    "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention",
    "MiniMax",
    2025,
    "2506.13585",
)
RLOO = Paper(
    "ahmadian2024back",
    "Back to Basics: Revisiting REINFORCE-Style Optimization for Learning from Human Feedback in LLMs",
    "Arash Ahmadian and others",
    2024,
    "2402.14740",
)
MIRROR_DESCENT = Paper(
    "kimi2025k15", "Kimi k1.5: Scaling Reinforcement Learning with LLMs", "Kimi Team", 2025, "2501.12599"
)
REBEL = Paper(
    "gao2024rebel",
    "REBEL: Reinforcement Learning via Regressing Relative Rewards",
    "Zhaolin Gao and others",
    2024,
    "2404.16767",
)
ASTAR_PO = Paper(
    "brantley2025astarpo",
    "Accelerating RL for LLM Reasoning with Optimal Advantage Regression",
    "Kianté Brantley and Mingyu Chen and Zhaolin Gao and Jason D. Lee and Wen Sun and Wenhao Zhan and Xuezhou Zhang",
    2025,
    "2505.20686",
)
QRPO = Paper(
    "matrenok2025qrpo",
    "Quantile Reward Policy Optimization: Alignment with Pointwise Regression and Exact Partition Functions",
    "Simon Matrenok and Skander Moalla and Caglar Gulcehre",
    2025,
    "2507.08068",
)
ILQL = Paper(
    "snell2022ilql",
    "Offline RL for Natural Language Generation with Implicit Language Q Learning",
    "Charlie Snell and Ilya Kostrikov and Yi Su and Mengjiao Yang and Sergey Levine",
    2022,
    "2206.11871",
)
DRO = Paper(
    "richemond2024dro",
    "Offline Regularised Reinforcement Learning for Large Language Models Alignment",
    "Pierre Harvey Richemond and others",
    2024,
    "2405.19107",
)
# By `loss_type`, of online and offline training.
PAPERS = {
    "apa": APA,
    "awr": AWR,
    "ppo": PPO,
    "grpo": GRPO,
    "cispo": CISPO,
    "rloo": RLOO,
    "mirror_descent": MIRROR_DESCENT,
    "rebel": REBEL,
    "response_apa": APA,
    "astar_po": ASTAR_PO,
    "qrpo": QRPO,
    "ilql": ILQL,
    "dro": DRO,
}


def papers_of(loss_type: str) -> list[Paper]:
    """That of APA, whose package this is, and that of the algorithm, if it is another's."""
    return list(dict.fromkeys([APA, PAPERS.get(loss_type, APA)]))
