"""StochCA: a timm Vision Transformer in training, in lockstep with a frozen copy of itself."""

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import timm
import torch
from timm.models._features import feature_take_indices
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from stochca.attention import Coin
from stochca.block import Masks, drop_path_masks, source_step, target_step
from stochca.compile import CompiledPerCase
from stochca.lora import base_model, has_adapters, shares_weights
from stochca.plan import CoinSampler, Mode, Per, Rng, Schedule, StepPlan, replay
from stochca.precision import SourceDtype, check_arithmetic, check_float8, hold_weights
from stochca.qkv import Rope
from stochca.recompute import Recomputation
from stochca.timm_interface import TimmInterface
from stochca.vit import (
    Stem,
    TimmViT,
    check_drivable,
    check_pair,
    image_size,
    moves_positions,
    num_class_rows,
    renormalization,
    stem,
)
from stochca_kernels.dispatch import Impl
from stochca_kernels.projection import KV


class StepOutputs(NamedTuple):
    """What a step computes for its losses.

    Args:
        logits: Of the target, `[B, num_classes]`.
        features: Pooled features `[B, C]`, of which the classifier computed the logits.
        taps: Tokens `[B, N, C]` of the target by the number of blocks before them.
        source_taps: The same of the source, which are constants.
        source_logits: `[B, classes of the source]`, a constant; None where not asked for.
    """

    logits: Tensor
    features: Tensor
    taps: dict[int, Tensor]
    source_taps: dict[int, Tensor]
    source_logits: Tensor | None


class StochCA(TimmInterface):
    r"""Fine-tune a timm ViT with stochastic cross-attention against its frozen pretrained self.

    In training each block :math:`l` draws :math:`\beta_l \sim \mathrm{Bernoulli}(p)` and computes
    :math:`(1 - \beta_l)\,SA(q_l, k_l, v_l) + \beta_l\,CA(q_l, k^0_l, v^0_l)`, with :math:`k^0_l, v^0_l` of
    the same block of the source, which sees the same images. In eval mode the model is exactly
    `self.target`.

    The target stays a plain timm model: save, publish and export `model.target`. The source is no
    submodule: it is in no state dict, no optimizer and no moving average, and stays in eval mode. It does
    follow `.to()`, and copying or pickling the whole object restores both, a moving average's copy included:
    average `model.target` to hold one model.

    In training, `forward` drives the parts of the blocks itself: hooks on a block or on its attention as a
    whole run in eval mode alone.

    Args:
        target: A timm `VisionTransformer`, `NaFlexVit` or `Eva`; `stochca.vit.check_drivable` says with which
            blocks and attention.
        source: A frozen model of the same architecture; None takes a copy of `target` as it is now, or, where
            it has LoRA layers of peft, the model below them, with the very weights of the target. It is
            switched to eval mode and requires no grad from here on, and `source_dtype` casts its weights in
            place. Where its `pretrained_cfg` names another normalisation than the target's, images are
            renormalised for it; where it takes images of another size, they are resized for it. Where the
            target moves its rotary positions at random in training, the source's move along.
        p: Probability that a block reads the source: a number, one per block, or a function of the step
            that returns either.
        per: "batch": one coin per block, as in the paper. "sample": one per block and sample.
        mode: "stochastic", or one of the deterministic alternatives, which read both pairs in every block:
            "mix" `(1 - p) SA + p CA`, "sum" `SA + CA`, "concat" one softmax over the keys of both.
        seed: Of the coins.
        rng: "counter": coins depend on (seed, step) alone. "official": torch's default CPU generator.
        class_rows: Leave out tokens that nothing reads: with class-token pooling the last block that reads
            its own tokens, and all blocks after it, compute the class row alone. Exact.
        recompute: Keep neither the source's keys and values nor the outputs of norms and activation functions
            for the backward, but compute them again there. Exact. A compiled model does this for norms and
            activation functions in any case.
        source_dtype: Hold the weights of the source's linear layers in the dtype that steps compute in, from
            the first step that reads it on: "bfloat16" or "float16" under autocast to the same, with the same
            results bit for bit; None leaves them as they are. "float8" computes most of the source in float8,
            which is not exact, see `stochca.precision.hold_weights`.
        impl: Implementation of the operator, see `stochca_kernels.stochca_attention`.

    Attributes:
        target: The timm model that is trained.
        coins: The `CoinSampler`; set `coins.step` to resume.
        plan: The `StepPlan` of the last forward, None before the first.

    Raises:
        TypeError: A model of a family that cannot be driven.
        ValueError: Source and target differ, or an option is out of range.

    Source: Seo, Lee and Hwang, arXiv 2402.16092.
    """

    def __init__(
        self,
        target: TimmViT,
        source: TimmViT | None = None,
        p: Schedule = 0.1,
        *,
        per: Per = "batch",
        mode: Mode = "stochastic",
        seed: int = 0,
        rng: Rng = "counter",
        class_rows: bool = True,
        recompute: bool = False,
        source_dtype: SourceDtype | None = None,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        check_drivable(target)
        if source is None:
            source = base_model(target) if has_adapters(target) else copy.deepcopy(target)
        check_drivable(source)
        check_pair(target, source)
        for name, value, values in (
            ("impl", impl, get_args(Impl)),
            ("source_dtype", source_dtype, (*get_args(SourceDtype), None)),
        ):
            if value not in values:
                raise ValueError(f"{name} must be one of {values}, got {value!r}")
        if source_dtype is not None and shares_weights(target, source):
            raise ValueError(
                f"source_dtype={source_dtype!r} would cast weights that are also the target's: leave it out"
            )
        if source_dtype == "float8":
            check_float8(source)
        self.target = target
        self._unregistered = [source.eval().requires_grad_(False)]
        self.coins = CoinSampler(p, len(target.blocks), per=per, mode=mode, seed=seed, rng=rng)
        self.plan: StepPlan | None = None
        self.class_rows = class_rows
        self.recompute = recompute
        self.source_dtype = source_dtype
        self._holds_source_dtype = source_dtype is None
        self.impl = impl
        self._renormalization = renormalization(target, source)
        self._factor_and_shift: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._target_step: Callable[..., Tensor] = target_step
        self._source_step: Callable[..., Any] = source_step

    @classmethod
    def from_timm(
        cls,
        name: str,
        *,
        pretrained: bool = True,
        p: Schedule = 0.1,
        per: Per = "batch",
        mode: Mode = "stochastic",
        seed: int = 0,
        rng: Rng = "counter",
        class_rows: bool = True,
        recompute: bool = False,
        source_dtype: SourceDtype | None = None,
        impl: Impl = "auto",
        **timm_kwargs: Any,
    ) -> "StochCA":
        """Create the target by name, and the source as its frozen copy.

        Args:
            name: Any name `timm.create_model` takes.
            pretrained: Load pretrained weights. Without them the source is the random initialisation.
            p: As for the class, and so the options after it.
            per: As for the class.
            mode: As for the class.
            seed: As for the class.
            rng: As for the class.
            class_rows: As for the class.
            recompute: As for the class.
            source_dtype: As for the class.
            impl: As for the class.
            timm_kwargs: Go to `timm.create_model`: `num_classes`, `img_size`, `drop_path_rate`, ...
        """
        target = timm.create_model(name, pretrained=pretrained, **timm_kwargs)
        coins: dict[str, Any] = {"p": p, "per": per, "mode": mode, "seed": seed, "rng": rng}
        how: dict[str, Any] = {"recompute": recompute, "source_dtype": source_dtype, "impl": impl}
        return cls(target, class_rows=class_rows, **coins, **how)

    def forward(self, images: Tensor, coins: Sequence[Coin] | None = None, **timm_kwargs: Any) -> Tensor:
        """Logits of a batch.

        Args:
            images: `[B, 3, H, W]`, normalised as the target's `pretrained_cfg` says.
            coins: Replays a draw: one bool, or one bool tensor `[B]`, per block. In eval mode too, where
                without coins this is exactly `self.target(images)`. None draws, in training.
            timm_kwargs: Go to the target in eval mode, `attn_mask` for instance; refused in training.

        Returns:
            What timm's `forward_head` returns, usually `[B, num_classes]`.
        """
        if not self.training and coins is None:
            return self.target(images, **timm_kwargs)
        _refuse(timm_kwargs)
        plan = self._plan(images, coins)
        return self.forward_head(self.target.norm(self._lockstep(images, plan, self._num_rows).target))

    def forward_step(
        self,
        images: Tensor,
        coins: Sequence[Coin] | None = None,
        *,
        taps: Iterable[int] = (),
        source_logits: bool = False,
    ) -> StepOutputs:
        """One step in training with all that its losses read, in the same pass.

        The source runs as far as the coins, the taps and its logits need, and all tokens are computed up to
        the last tap.

        Args:
            images: `[B, 3, H, W]`.
            coins: As in `forward`; None draws.
            taps: After how many blocks the tokens of both models are returned: 0 for those before the first
                block, the depth for those after the last.
            source_logits: Return the logits of the source's own head.

        Raises:
            ValueError: A tap is outside the model, or its features have two classifiers.
        """
        taps, depth = tuple(sorted(set(taps))), len(self.target.blocks)
        if taps and not 0 <= taps[0] <= taps[-1] <= depth:
            raise ValueError(f"taps must be from 0 to the depth of the model ({depth}), got {taps}")
        classifier = self.get_classifier()
        if isinstance(classifier, tuple):
            raise ValueError(f"{type(self.target).__name__} has {len(classifier)} classifiers, wanted one")
        plan = replace(self._plan(images, coins), taps=taps, whole_source=source_logits)
        tokens = self._lockstep(images, plan, self._num_rows)
        features = self.forward_head(self.target.norm(tokens.target), pre_logits=True)
        logits = None
        if source_logits:
            with torch.no_grad():
                logits = self.source.forward_head(self.source.norm(tokens.source))
        return StepOutputs(classifier(features), features, tokens.target_taps, tokens.source_taps, logits)

    def forward_features(
        self, images: Tensor, coins: Sequence[Coin] | None = None, **timm_kwargs: Any
    ) -> Tensor:
        """All tokens `[B, N, C]` after the final norm, as timm's; arguments as `forward`'s."""
        if not self.training and coins is None:
            return self.target.forward_features(images, **timm_kwargs)
        _refuse(timm_kwargs)
        return self.target.norm(self._lockstep(images, self._plan(images, coins)).target)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        coins: Sequence[Coin] | None = None,
        **timm_kwargs: Any,
    ) -> Any:
        """Tokens after some of the blocks, as timm's `forward_intermediates`, in training with StochCA.

        Args:
            images: `[B, 3, H, W]`.
            indices: Which blocks, as timm has it: the last n for an int, all for None.
            return_prefix_tokens: Return pairs (patches, prefix tokens).
            norm: Apply the final norm to each.
            stop_early: Run no block after the last one asked for.
            output_fmt: "NCHW" or "NLC".
            intermediates_only: Leave out the final tokens.
            output_dict: Return a dictionary with timm's keys.
            coins: As in `forward`.
            timm_kwargs: As in `forward`.
        """
        if not self.training and coins is None:
            if output_dict:  # not every family has it
                timm_kwargs["output_dict"] = True
            return self.target.forward_intermediates(
                images,
                indices=indices,
                return_prefix_tokens=return_prefix_tokens,
                norm=norm,
                stop_early=stop_early,
                output_fmt=output_fmt,
                intermediates_only=intermediates_only,
                **timm_kwargs,
            )
        _refuse(timm_kwargs)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f'output_fmt must be "NCHW" or "NLC", got {output_fmt!r}')
        blocks, last = feature_take_indices(len(self.target.blocks), indices)
        plan = self._plan(images, coins)
        if stop_early:
            plan = StepPlan(plan.coins[: last + 1])
        tokens = self._lockstep(images, plan, read=[i + 1 for i in blocks])
        tapped = [self.target.norm(t) if norm else t for t in tokens.target_taps.values()]
        split = self.target.num_prefix_tokens
        prefixes, patches = [t[:, :split] for t in tapped], [t[:, split:] for t in tapped]
        if output_fmt == "NCHW":
            embed = getattr(self.target, "patch_embed", None) or self.target.embeds
            height, width = embed.dynamic_feat_size(images.shape[-2:])
            patches = [t.transpose(1, 2).unflatten(2, (height, width)).contiguous() for t in patches]
        if output_dict:
            named = {"image_intermediates": patches}
            if return_prefix_tokens and split:
                named["image_intermediates_prefix"] = prefixes
            last = {} if intermediates_only else {"image_features": self.target.norm(tokens.target)}
            return named | last
        result = list(zip(patches, prefixes, strict=True)) if return_prefix_tokens and split else patches
        return result if intermediates_only else (self.target.norm(tokens.target), result)

    @property
    def _num_rows(self) -> int | None:
        return num_class_rows(self.target) if self.class_rows else None

    def _plan(self, images: Tensor, coins: Sequence[Coin] | None) -> StepPlan:
        """Draw the coins of a step, or replay them."""
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a tensor (B, C, H, W) in training, got {type(images).__name__}")
        if images.ndim != 4:
            raise ValueError(f"images must have shape (B, C, H, W), got {tuple(images.shape)}")
        if self.source_dtype is not None:
            check_arithmetic(self.source_dtype, images)
        depth = len(self.target.blocks)
        if coins is not None:
            return replay(coins, depth, images.shape[0])
        # timm may have pruned blocks, whose coins are drawn all the same.
        return StepPlan(self.coins.draw(images.shape[0], images.device).coins[:depth])

    def _lockstep(
        self, images: Tensor, plan: StepPlan, num_rows: int | None = None, read: Iterable[int] = ()
    ) -> "_Tokens":
        """Advance target and source block by block; return the tokens at taps, and the target's at `read`."""
        self.plan = plan
        x, ropes = own = stem(self.target, images)
        x0, source_ropes = self._source_stem(images) if plan.source_blocks or plan.taps else own
        if moves_positions(self.target):
            source_ropes = ropes  # both see the same patches at the same places
        if plan.taps and x.shape != x0.shape:
            raise ValueError(
                "taps compare the tokens of both models, which must be as many: the target has "
                f"{x.shape[1]} tokens of these images, the source {x0.shape[1]}"
            )
        masks = drop_path_masks(self.target.blocks, x)
        compiled = isinstance(self._target_step, CompiledPerCase)
        recomputation = Recomputation(() if compiled else self.target.blocks) if self.recompute else None
        step = Lockstep(plan, ropes, source_ropes, masks, num_rows, recomputation)
        target_taps, source_taps = {}, {}
        wanted = {*plan.taps, *read}
        with recomputation or nullcontext():
            for i in range(len(plan.coins) + 1):
                if i in wanted:
                    target_taps[i] = x
                if i in plan.taps:
                    source_taps[i] = x0
                if i < len(plan.coins):
                    x, x0 = self._block(i, step, x, x0)
        return _Tokens(x, x0, target_taps, source_taps)

    def _block(self, i: int, step: "Lockstep", x: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Advance target tokens `x` and source tokens `x0` by block `i`."""
        coin = step.plan.coins[i]
        rows = step.num_rows if i >= step.plan.first_class_row_block else None
        checkpointing = self.target.grad_checkpointing and torch.is_grad_enabled()
        source_kv: KV = None
        if i < step.plan.source_blocks:
            need_kv, advance = coin is not False, step.plan.advances_source(i)
            # Tokens are smaller than their pair, which checkpointing can project again with the block.
            as_tokens = rows is not None or (checkpointing and step.recomputation is not None)
            block, rope = self.source.blocks[i], step.source_ropes[i]
            with torch.no_grad():
                source_kv, y, x0 = self._source_step(block, x0, need_kv, advance, as_tokens, rope, self.impl)
            if step.recomputation is not None and y is not None:
                step.recomputation.of_pair(source_kv, block.attn, y, rope)
        if coin is True and rows is not None and x.shape[1] > rows:
            # The other tokens are neither queries nor keys. A copy, whose layout is that of all such blocks.
            x = x[:, :rows].contiguous()
        arguments = (x, source_kv, coin, step.ropes[i], step.masks[i], rows, self.impl)
        if checkpointing:
            target = checkpoint(self._target_step, self.target.blocks[i], *arguments, use_reentrant=False)
        else:
            target = self._target_step(self.target.blocks[i], *arguments)
        return target, x0

    @torch.no_grad()
    def source_logits(self, images: Tensor) -> Tensor:
        """What the source's own head says of images that are normalised for the target, `[B, classes]`."""
        x0, ropes = self._source_stem(images)
        for block, rope in zip(self.source.blocks, ropes, strict=True):
            _, _, x0 = self._source_step(block, x0, False, True, False, rope, self.impl)
        return self.source.forward_head(self.source.norm(x0))

    @torch.no_grad()
    def _source_stem(self, images: Tensor) -> Stem:
        if self.source_dtype is not None and not self._holds_source_dtype:
            hold_weights(self.source, self.source_dtype)
            self._holds_source_dtype = True
        return stem(self.source, self._for_source(images))

    def _for_source(self, images: Tensor) -> Tensor:
        """Images as the source was trained to see them."""
        if self._renormalization is not None:
            like = images.device, images.dtype
            if like not in self._factor_and_shift:
                # Moved to the device once, and not waited for in every step.
                self._factor_and_shift[like] = images.new_tensor(self._renormalization)[..., None, None]
            factor, shift = self._factor_and_shift[like]
            images = images * factor + shift
        size = image_size(self.source)
        if size is None or size == tuple(images.shape[-2:]):
            return images
        resized = F.interpolate(
            images.to(torch.promote_types(images.dtype, torch.float32)), size, mode="bicubic", antialias=True
        )
        return resized.to(images.dtype)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the step of a block, which all blocks share; arguments go to `torch.compile`.

        The target has one graph for self- and one for cross-attention, and with class-token pooling one more
        of each for the class rows; the source one for each way it is needed. The whole model is not one
        graph: its coins change with every step. Names of parameters stay as they are.
        """
        self._target_step = CompiledPerCase(target_step, *args, **kwargs)
        self._source_step = CompiledPerCase(source_step, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StochCA":
        super()._apply(fn, recurse)
        self.source._apply(fn, recurse)
        self._holds_source_dtype = self.source_dtype is None
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A compiled function cannot be pickled; call compile() again after loading.
        return {**self.__dict__, "_target_step": target_step, "_source_step": source_step}

    def extra_repr(self) -> str:
        """What StochCA adds to the target."""
        names = ("coins", "class_rows", "recompute", "source_dtype", "impl")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class Lockstep(NamedTuple):
    """What the blocks of one step have in common, or find under their number.

    Args:
        plan: The coins, and what follows from them.
        ropes: The target's rotary embeddings.
        source_ropes: The source's.
        masks: The target's stochastic depth.
        num_rows: How many class rows are computed where nothing reads more; None where all tokens are.
        recomputation: What keeps recipes instead of tensors, or None.
    """

    plan: StepPlan
    ropes: Sequence[Rope]
    source_ropes: Sequence[Rope]
    masks: Sequence[Masks]
    num_rows: int | None
    recomputation: Recomputation | None


class _Tokens(NamedTuple):
    """Tokens `[B, N, C]` of both models after the last block that ran, and at taps."""

    target: Tensor
    source: Tensor
    target_taps: dict[int, Tensor]
    source_taps: dict[int, Tensor]


def _refuse(timm_kwargs: dict[str, Any]) -> None:
    if timm_kwargs:
        raise TypeError(f"StochCA takes no {', '.join(timm_kwargs)} in training")
