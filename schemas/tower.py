"""What a vision tower is to a recipe."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from longvlm.schemas.errors import InputError
from longvlm.schemas.fingerprint import ADDED

Aspect = Literal["stretch", "letterbox"]
TOWER_SETTINGS = {"patch_grid", "aspect"}  # of a user's recipe: how a tower is shown frames
MAX_GRID_SIDE = 128  # patch tokens: frames of 16 million pixels; what is meant as more is a mistake


@dataclass(frozen=True)
class TowerSpec:
    """A vision tower, as far as recipes care: whose weights, and the shapes that go in and come out.

    A picture is what the tower looks at at once: a frame, or for some families several in a row.
    """

    name: str  # hub id or folder it was loaded from
    weights: str  # fingerprint of the vision weights: the same tower in two folders is the same tower
    num_layers: int  # beside the embeddings, hidden states that may be kept; 0: there is one output, and it is kept
    patch_grid: tuple[int, int]  # patch tokens of a picture: rows, columns
    dim: int  # channels of a patch token, all streams together
    image_size: int | tuple[int, int]  # pixels: a square's side; or height and width, of a tower that takes any grid
    has_cls: bool
    search_dim: int | None  # width of the search embedding; None where no text encoder is aligned with it
    frames_per_picture: int = field(default=1, metadata=ADDED)
    num_streams: int = field(default=1, metadata=ADDED)  # outputs side by side in a token; the first decides merging
    aspect: Aspect = field(default="stretch", metadata=ADDED)  # how a frame of another shape is made to fit
    has_positions: bool = field(default=False, metadata=ADDED)  # whether a token's time and place are stored with it

    @property
    def num_patches(self) -> int:
        """Patch tokens of a picture."""
        return self.patch_grid[0] * self.patch_grid[1]

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width of the frames that it takes, in pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def metric_dim(self) -> int:
        """The leading channels of a token that decide which ones are merged."""
        return self.dim // self.num_streams

    def num_pictures(self, num_frames: int) -> int:
        """How many pictures some frames in a row make; the last one may show its last frame several times."""
        return -(-num_frames // self.frames_per_picture)

    @property
    def takes_squares(self) -> bool:
        """Whether it is shown squares, whatever the aspect of a video."""
        return self.aspect == "stretch" and self.frame_size[0] == self.frame_size[1]

    def shown(self, grid: Any, aspect: Any) -> "TowerSpec":
        """The same tower, shown frames as a user's settings say, None being nothing; InputError if it cannot be."""
        if aspect is not None and aspect not in get_args(Aspect):
            raise InputError(f"the recipe's aspect is {aspect!r}; use one of {', '.join(get_args(Aspect))}.")
        if grid is not None:
            sides = grid if isinstance(grid, tuple) else ()
            if len(sides) != 2 or not all(type(side) is int and 0 < side <= MAX_GRID_SIDE for side in sides):
                raise InputError(
                    f"the recipe's patch_grid is {grid!r}; write rows and columns of patch tokens such as [10, 16], "
                    f"of at most {MAX_GRID_SIDE} each."
                )
        return replace(self if grid is None else self._with_grid(grid), aspect=aspect or self.aspect)

    def _with_grid(self, grid: tuple[int, int]) -> "TowerSpec":
        if grid == self.patch_grid:
            return self
        if not isinstance(self.image_size, tuple):
            raise InputError(
                f"the tower {self.name} takes one grid of patches, {self.patch_grid[0]} x {self.patch_grid[1]}; leave "
                "patch_grid out of the recipe."
            )
        pixels = [
            px // number * wanted for px, number, wanted in zip(self.image_size, self.patch_grid, grid, strict=True)
        ]
        return replace(self, patch_grid=grid, image_size=(pixels[0], pixels[1]))
