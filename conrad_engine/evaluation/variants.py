"""What a suite compares: the method as it is, with a part exchanged, with worse pictures, and without any prior."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..baselines import BASELINES as PUBLISHED
from ..baselines import NEEDS_DEPTH, overrides_of
from ..config import PipelineConfig, with_overrides
from ..errors import InputError
from .baselines import BASELINES


@dataclass(frozen=True)
class Variant:
    """One column of the comparison."""

    name: str
    meaning: str
    overrides: dict[str, object] = field(default_factory=dict)
    """Settings that differ from the preset, by dotted name."""
    picture: str = "picture.png"
    """File of the suite's object that is handed in."""
    gives_mask: bool = False
    """The true mask is handed in beside the picture."""
    gives_depth: bool = False
    """The true depth is handed in beside the picture."""
    baseline: str = ""
    """Name in `BASELINES`: no optimisation at all."""

    def settings(self, config: PipelineConfig) -> PipelineConfig:
        return with_overrides(config, self.overrides)


_ALL = [
    Variant("constraint", "the method as it is"),
    Variant("loss", "a picture loss in place of the constraint", {"constraint.kind": "loss"}),
    Variant(
        "known_depth", "the true depth given, known-depth form", {"constraint.kind": "known_depth"}, gives_depth=True
    ),
    Variant("no_sds", "sampled views fitted, no score distillation", {"optimize.n_steps": 0}),
    Variant("no_detail", "no detail drawn on the texture", {"mesh.detail_views": 0}),
    Variant("no_symmetry", "no plane of symmetry looked for", {"optimize.symmetry": False}),
    Variant("no_warm_start", "score distillation from the start", {"optimize.warm_start_views": 0}),
    Variant("degraded", "blurred, noisy, compressed picture, ragged mask", picture="picture_degraded.png"),
    Variant("photo", "composited over a photo, no mask given", picture="picture_photo.png"),
    Variant("photo_masked", "composited over a photo, true mask given", picture="picture_photo.png", gives_mask=True),
    *(
        Variant(
            f"{name}_constrained" if constrained else name,
            f"{name}'s settings, with {'the constraint' if constrained else 'its picture loss'}",
            overrides_of(name, constrained),
            gives_depth=name in NEEDS_DEPTH,
        )
        for name in PUBLISHED
        for constrained in (False, True)
    ),
    Variant("relief", "inflated silhouette, no prior", baseline="relief"),
    Variant("ellipsoid", "ellipsoid, no prior", baseline="ellipsoid"),
    Variant("billboard", "cardboard cut-out, no prior", baseline="billboard"),
]
VARIANTS: dict[str, Variant] = {variant.name: variant for variant in _ALL}
assert all(v.baseline in BASELINES for v in _ALL if v.baseline)


def find_variant(name: str) -> Variant:
    """The variant of that name.

    Raises:
        InputError: There is none.
    """
    if name not in VARIANTS:
        raise InputError(f"unknown variant {name!r}: use {', '.join(VARIANTS)}")
    return VARIANTS[name]
