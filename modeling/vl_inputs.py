"""Checks of the inputs of a forward pass. Every function raises a `ValueError` that says what was given and expected.

B rows, L positions, N patches of an image, C channels, H x W pixels, p patch side.
"""

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import is_tracing


def check_inputs(
    model: PreTrainedModel,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    pixel_values: torch.Tensor | None,
    interpolate_pos_encoding: bool = False,
    bool_masked_pos: torch.Tensor | None = None,
) -> None:
    """
    Checks a tower's inputs against its configuration; values are checked only where reading them is free. Called once
    on the user's input, and not by later passes.
    """
    config = model.config
    if input_ids is None and pixel_values is None:
        raise ValueError("got neither input_ids nor pixel_values; expected text, pictures, or both")
    if bool_masked_pos is not None and pixel_values is None:
        raise ValueError("got bool_masked_pos, which masks patches, but pixel_values is None")

    # shapes, which cost nothing to look at
    check_shapes(input_ids, attention_mask, pixel_values)
    n_patches = None
    if pixel_values is not None:
        size = None if interpolate_pos_encoding else config.image_size
        n_patches = check_image_size(pixel_values, config.num_channels, config.patch_size, size)
    if bool_masked_pos is not None:
        check_patch_mask(bool_masked_pos, pixel_values.shape[0], n_patches)

    # reading values breaks compiled graphs and makes an accelerator wait: there only outside of training
    given = input_ids if input_ids is not None else pixel_values
    if is_tracing(given) or given.is_meta or (given.device.type != "cpu" and model.training):
        return
    if pixel_values is not None:
        check_finite(pixel_values)
    if input_ids is not None:
        vocab_size = model.get_input_embeddings().num_embeddings
        check_ids(input_ids, vocab_size, config.cls_token_id)
        if config.pair_layout == "joint":
            check_layout(input_ids, attention_mask, config.image_token_id, n_patches, config.max_text_length)
        else:
            check_text(input_ids, attention_mask, config.image_token_id, config.max_text_length)


def patch_count(pixel_values: torch.Tensor, patch_size: int) -> int:
    """Number of patches N of images (..., H, W)."""
    return (pixel_values.shape[-2] // patch_size) * (pixel_values.shape[-1] // patch_size)


def check_shapes(
    input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, pixel_values: torch.Tensor | None
) -> None:
    """Ids must be integers (B, L), ids and images have B rows each, and the mask the shape of the ids."""
    if input_ids is not None and (input_ids.ndim != 2 or not input_ids.numel()):
        raise ValueError(f"input_ids have shape {tuple(input_ids.shape)}; expected (rows, positions), one at least")
    if input_ids is not None and (input_ids.is_floating_point() or input_ids.dtype == torch.bool):
        raise ValueError(f"input_ids are {input_ids.dtype}; expected whole numbers")
    if input_ids is not None and attention_mask is not None and attention_mask.shape[:2] != input_ids.shape[:2]:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; "
            f"expected {tuple(input_ids.shape)}, the shape of input_ids"
        )
    if input_ids is not None and pixel_values is not None and input_ids.shape[0] != pixel_values.shape[0]:
        raise ValueError(f"got {len(input_ids)} texts and {len(pixel_values)} pictures; expected as many of each")


def check_image_size(pixel_values: torch.Tensor, num_channels: int, patch_size: int, image_size: int | None) -> int:
    """Images must be (B, C, H, W) with H = W = `image_size`, or multiples of p if that is None. Returns N."""
    got = tuple(pixel_values.shape)
    if len(got) != 4 or got[1] != num_channels:
        side = image_size or "height, width"
        raise ValueError(f"pixel_values have shape {got}; expected (pictures, {num_channels}, {side}, {side})")

    # the size that the positions are for
    if image_size is not None and got[2:] != (image_size, image_size):
        raise ValueError(
            f"pictures are {got[2]}x{got[3]}; expected {image_size}x{image_size} "
            f"(or pass interpolate_pos_encoding=True to interpolate the positions)"
        )
    if got[2] % patch_size or got[3] % patch_size:
        raise ValueError(f"pictures are {got[2]}x{got[3]}; expected multiples of the patch size {patch_size}")
    return patch_count(pixel_values, patch_size)


def check_patch_mask(bool_masked_pos: torch.Tensor, batch_size: int, n_patches: int) -> None:
    """The mask must have one flag per patch: bool (B, N)."""
    if bool_masked_pos.dtype != torch.bool:
        raise ValueError(f"bool_masked_pos is {bool_masked_pos.dtype}; expected torch.bool, True for masked patches")
    if tuple(bool_masked_pos.shape) != (batch_size, n_patches):
        raise ValueError(
            f"bool_masked_pos has shape {tuple(bool_masked_pos.shape)}; expected {(batch_size, n_patches)}, "
            f"a flag for each patch of each picture"
        )


def check_text_alone(pixel_values: torch.Tensor | None) -> None:
    """`get_text_features` takes no images."""
    if pixel_values is not None:
        raise ValueError("get_text_features reads text alone; drop pixel_values or use get_multimodal_features")


def check_images_alone(input_ids: torch.Tensor | None, pixel_values: torch.Tensor, config: PreTrainedConfig) -> None:
    """`get_image_features` takes no text: ids (B, L) may only hold [CLS] and, in the joint layout, placeholders."""
    if input_ids is None:
        return

    # number of ids without a text
    placed = 1 + patch_count(pixel_values, config.patch_size) if config.pair_layout == "joint" else 0
    if input_ids.shape[-1] > placed:
        raise ValueError("get_image_features reads pictures alone; drop input_ids or use get_multimodal_features")


def check_finite(pixel_values: torch.Tensor) -> None:
    """Pixels (B, C, H, W) must not be NaN or infinite; the error names the rows."""
    finite = torch.isfinite(pixel_values)
    if not finite.all():
        rows = (~finite).flatten(1).any(1).nonzero().flatten().tolist()
        raise ValueError(f"pixel_values hold NaN or infinity in rows {rows}; expected finite numbers")


def check_ids(input_ids: torch.Tensor, vocab_size: int, cls_token_id: int) -> None:
    """Ids (B, L) must be in the vocabulary, and each row must begin with [CLS]."""
    low, high = input_ids.min().item(), input_ids.max().item()
    if low < 0 or high >= vocab_size:
        raise ValueError(f"input_ids lie in [{low}, {high}]; expected ids in [0, {vocab_size - 1}]")
    first = input_ids[:, 0]  # (B,)
    if (first != cls_token_id).any():
        raise ValueError(
            f"a row starts with id {first[first != cls_token_id][0].item()}; "
            f"expected [CLS] ({cls_token_id}) first, as VisionLanguageProcessor lays rows out (padding on the right)"
        )


def check_layout(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    image_token_id: int,
    n_patches: int | None,
    max_text_length: int,
) -> None:
    """Ids (B, L) must hold one placeholder per patch (none if `n_patches` is None) and not too many tokens."""
    real = torch.ones_like(input_ids) if attention_mask is None else (attention_mask != 0).long()
    placeholders = ((input_ids == image_token_id) * real).sum(1)  # (B,)

    # one placeholder per patch
    if n_patches is None and placeholders.any():
        raise ValueError(
            f"input_ids hold {placeholders.max().item()} image placeholders in a row but pixel_values is None"
        )
    if n_patches is not None and (placeholders != n_patches).any():
        raise ValueError(
            f"input_ids hold {placeholders[placeholders != n_patches][0].item()} image placeholders "
            f"(id {image_token_id}) in a row; the pictures have {n_patches} patches each: "
            f"lay both out together with VisionLanguageProcessor(images=..., text=...)"
        )

    # what is neither [CLS] nor placeholder is text
    tokens = (real.sum(1) - 1 - placeholders).max().item()
    if tokens > max_text_length:
        raise ValueError(f"a text has {tokens} tokens; expected at most {max_text_length} (config.max_text_length)")


def check_text(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, image_token_id: int, max_text_length: int
) -> None:
    """Ids (B, T) must be [CLS], the text's tokens, not too many, and padding on the right only."""
    real = torch.ones_like(input_ids) if attention_mask is None else (attention_mask != 0).long()
    strays = (input_ids == image_token_id) & (real == 1)  # (B, T)
    if strays.any():
        raise ValueError(
            f"input_ids hold {strays.sum(1).max().item()} image placeholders (id {image_token_id}) in a row, and this "
            f"family reads text and image apart; expected the text alone, as a processor with joint_layout=False gives"
        )
    check_padding(real)
    tokens = (real.sum(1) - 1).max().item()
    if tokens > max_text_length:
        raise ValueError(f"a text has {tokens} tokens; expected at most {max_text_length} (config.max_text_length)")


def check_masks(
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor,
    masked_input_ids: torch.Tensor | None,
    bool_masked_pos: torch.Tensor | None,
    patch_size: int,
) -> None:
    """Masked ids must have the shape of the ids, (B, L), and the mask one flag per patch, (B, N)."""
    if masked_input_ids is not None and masked_input_ids.shape != input_ids.shape:
        raise ValueError(
            f"masked_input_ids have shape {tuple(masked_input_ids.shape)}; "
            f"expected {tuple(input_ids.shape)}, the shape of input_ids"
        )
    if bool_masked_pos is not None:
        check_patch_mask(bool_masked_pos, pixel_values.shape[0], patch_count(pixel_values, patch_size))


def check_kept_patches(kept_patches: torch.Tensor, batch_size: int, n_patches: int) -> None:
    """Indices of the kept patches must be int64 (B, K), with K at most N."""
    shape = tuple(kept_patches.shape)
    fits = len(shape) == 2 and shape[0] == batch_size and 1 <= shape[1] <= n_patches
    if not fits or kept_patches.dtype != torch.int64:
        raise ValueError(
            f"kept_patches are {kept_patches.dtype} of shape {shape}; expected int64 of shape ({batch_size}, K), "
            f"places of 1 to {n_patches} patches of each picture"
        )


def check_padding(attention_mask: torch.Tensor) -> None:
    """Padding must be on the right of the text, (B, L), because positions are counted from [CLS]."""
    real = attention_mask != 0
    gaps = (real[:, 1:] & ~real[:, :-1]).any(1)  # (B,)
    if gaps.any():
        raise ValueError(
            f"in rows {gaps.nonzero().flatten().tolist()} attention_mask has a 0 before a 1; expected padding on the "
            f"right only, as the processor lays texts out"
        )


def check_pairs(input_ids: torch.Tensor, attention_mask: torch.Tensor, image_token_id: int, n_patches: int) -> None:
    """
    Ids and mask (B, L) must follow the joint layout: [CLS], N placeholders, then the text, with padding on the right,
    because a training step slices its streams from it and takes a token's slot as its position in the text.
    """
    # only where reading values is free
    if input_ids.device.type != "cpu" or is_tracing(input_ids):
        return
    strays = (input_ids[:, 1 : 1 + n_patches] != image_token_id).any(1)  # (B,)
    if strays.any():
        raise ValueError(
            f"in rows {strays.nonzero().flatten().tolist()} the {n_patches} image placeholders must follow [CLS], "
            f"and the text comes behind them; lay pairs out with VisionLanguageProcessor(images=..., text=...)"
        )
    check_padding(attention_mask)
