"""What processors do to pictures alike: resizing as transformers does, and saying how to normalise.

Pictures are resized by Pillow, as transformers' processors without torchvision do ("slow", or backend "pil"), and clips
by torch, as those with torchvision do ("fast"): transformers has no others for clips. Both give uint8. For seven
pictures of scikit-image, the fast ones of transformers 5.24 differ from the slow ones by up to 0.2 levels of 255 on
average and by up to 8 at a point; ours are the slow ones' exactly. The device divides by 255 and normalises, so a
number travels as one byte.
"""

import numpy as np
from numpy.typing import NDArray

from engine.plugin import Terms
from engine.plugin.media import Pixels

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # mean and deviation
STANDARD = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
BILINEAR, BICUBIC = 2, 3  # as Pillow counts, and config files with it
TORCH_MODES = {BILINEAR: "bilinear", BICUBIC: "bicubic"}


def resized(
    frames: NDArray[np.uint8], height: int, width: int, resample: int, *, clip: bool = False
) -> NDArray[np.uint8]:
    """uint8 [n, height, width, 3] of uint8 [n, h, w, 3]."""
    if frames.shape[1:3] == (height, width):
        return frames
    if clip:
        return _resized_by_torch(frames, height, width, resample)
    from PIL import Image

    resample = Image.Resampling(resample)
    return np.stack([np.asarray(Image.fromarray(each).resize((width, height), resample)) for each in frames])


def _resized_by_torch(frames: NDArray[np.uint8], height: int, width: int, resample: int) -> NDArray[np.uint8]:
    import torch  # here: pictures do without it

    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    sized = torch.nn.functional.interpolate(pixels, (height, width), mode=TORCH_MODES[resample], antialias=True)
    return sized.permute(0, 2, 3, 1).contiguous().numpy()


def pixels_of(
    frames: NDArray[np.uint8], grid: tuple[int, ...], terms: Terms, usual: tuple[tuple[float, ...], ...]
) -> Pixels:
    """`frames` as a tower takes them, normalised as `terms` say."""
    mean, std = (
        terms.numbers(name, 3, above=-1.0) if terms.get(name) is not None else each
        for name, each in zip(("image_mean", "image_std"), usual, strict=True)
    )
    if not terms.flag("do_normalize", True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    scale = terms.number("rescale_factor", 1 / 255) if terms.flag("do_rescale", True) else 1.0
    return Pixels(np.ascontiguousarray(frames).tobytes(), frames.shape, grid, scale, mean, std)
