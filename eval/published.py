"""Published figures that results are set beside, in per cent, as printed."""

from dataclasses import dataclass

from eval.results import MFR_SETS

IJB_FARS = (1e-5, 1e-4)
COLUMNS = {  # key -> head: the sets of MFR-Ongoing by their keys in a result, and IJB-C by its FAR
    **{name: f"MFR {title}" for name, title in MFR_SETS.items()},
    **{far: f"IJB-C @{far:.0e}" for far in IJB_FARS},
}


@dataclass(frozen=True)
class PublishedRow:
    """What a paper reports of one model; columns that it does not report are left out."""

    model: str
    percent: dict[str | float, float]  # key of COLUMNS -> figure
    source: str


_LVFACE = "LVFace, arXiv:2501.13420, trained on WebFace42M"
PUBLISHED = (
    PublishedRow(
        "LVFace-L",
        {
            **{"mask": 93.56, "children": 94.31, "african": 98.79, "caucasian": 99.26, "south_asian": 99.26, "east_asian": 91.02},
            **{"mr_all": 98.49, 1e-5: 97.25, 1e-4: 98.06},
        },
        _LVFACE,
    ),
    *(
        PublishedRow(f"  stages: {stages}", {"mr_all": figure}, "its ablation of the stages, in version 3 (ICCV 2025)")
        for stages, figure in (("none", 97.27), ("+ alignment", 97.52), ("+ stabilization", 98.22), ("+ refinement", 98.49))
    ),
)
