"""What a model sees a video through. It is known without weights and without torch, so that drivers plan by it."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from longvlm.schemas.recipe import Focus
from longvlm.schemas.tower import TowerSpec

if TYPE_CHECKING:
    from longvlm.pipeline.vision.budget import Budget


@dataclass(frozen=True)
class Sight:
    """What a model sees a video through: what an index made for it must hold. Known from its config alone."""

    tower: str  # the vision tower whose tokens it reads: a folder or hub id
    feature_layer: int  # hidden state of the tower that its projector reads, as IndexRecipe.feature_layer
    num_global_tokens: int  # rows at the head of the prefix that its projector was trained on
    num_marker_tokens: int = 0  # beside each segment's in its prompts, at most
    marks_pictures: bool = False  # while nothing of a video is merged, beside each picture's instead
    # of the tokens that are read, as their recipe says (`reading`)
    patch_grid: tuple[int, int] | None = None
    frames_per_picture: int = 1
    num_streams: int = 1

    def reading(self, tower: TowerSpec) -> "Sight":
        """The same over the tokens of a recipe's tower."""
        return replace(
            self,
            patch_grid=tower.patch_grid,
            frames_per_picture=tower.frames_per_picture,
            num_streams=tower.num_streams,
        )

    def budget(
        self, max_tokens: int | None, tokens_per_segment: int | None, focus: Focus | None, num_beside: int | None = None
    ) -> "Budget":
        """What a prompt may hold of a video (see `Budget`); `num_beside` where it is known better than at most."""
        from longvlm.pipeline.vision.budget import Budget

        return Budget(
            max_tokens,
            tokens_per_segment,
            focus,
            num_global=self.num_global_tokens,
            num_beside=self.num_marker_tokens if num_beside is None else num_beside,
            frames_per_block=self.frames_per_picture if self.marks_pictures else None,
            num_streams=self.num_streams,
        )
