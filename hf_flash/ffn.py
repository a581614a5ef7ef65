"""FlashFFN: what the model sees in place of a stock FFN block."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

from hf_flash import ops, trace
from hf_flash.engine import Engine
from hf_flash.errors import FlashError
from hf_flash.families import FFNBlock, Part
from hf_flash.memory import trim_malloc
from hf_flash.native import MAX_TOKENS
from hf_flash.stats import FlashStats


class Bias(nn.Module):
    """A stock bias under its stock name: loaded, saved and moved by transformers like any other parameter.

    In an inline block it stands where the down projection stood. The bias has been added by then, so what it is called
    with passes through; `weight` answers layers that ask for a dtype.
    """

    def __init__(self, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_parameter("bias", bias)
        self.weight = torch.empty(0, dtype=dtype, device="cpu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Bias:
        self.weight = fn(self.weight)  # model.to(dtype)
        super()._apply(fn, recurse)
        return self


class FlashFFN(nn.Module):
    """An FFN whose weights stay on flash.

    Only what is small lives in the module: biases and the activation, under their stock names. The engine that
    computes it is attached once the memory plan is made and the checkpoint is open.

    Args:
        block: which block of the model this replaces.
        activation: the block's own activation module or function.
        biases: the stock biases by full parameter name; they become this module's.
        dtype: of the stock weights.
    """

    def __init__(
        self, block: FFNBlock, activation: ops.Activation, biases: Mapping[str, nn.Parameter], dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.block = block
        self.engine: Engine | None = None
        self.stats: FlashStats | None = None  # set on the first FFN of the model: it counts the tokens
        # Set there, on a decoder's first and on the first with an early gate: called with the tokens as a pass begins.
        self.on_pass: Sequence[Callable[[int], None]] = ()
        self.trim = False  # set there too: a tokenizer that was loaded meanwhile, or a long pass, left freed memory
        self.order: torch.Tensor | None = None  # [d_ffn] neuron of each row on flash; biases are the stock model's
        self._ordered: dict[bool, tuple[object, torch.Tensor]] = {}  # up's bias or the gate's, and what it was made of
        self.compute_dtype: torch.dtype | None = None  # where the stock block computes wider than its input
        self._bias_path: dict[str, str] = {}  # full name of a bias -> its path below this module
        if block.inline:
            self._take_inline(biases, dtype)
        else:
            for name, bias in biases.items():
                self._bias_path[name] = name.removeprefix(block.path + ".")
                _add_module(self, self._bias_path[name].rpartition(".")[0], Bias(bias, dtype))
        # A module goes where it was, so that parameters of its own (xIELU) keep their names.
        act_path = block.activation.removeprefix(block.path + ".")
        own = isinstance(activation, nn.Module) and not block.inline and act_path != block.activation
        biased = [part for part in (block.gate, block.up, block.down) if part is not None and part.bias is not None]
        self._homes = [self._home(part)._parameters for part in biased]  # where they are, whatever they are by then
        # What was there last, with address and version, and what was made of it.
        self._biases: tuple[list[tuple[Any, int, int]], ops.Biases] = ([(self, 0, 0)] * len(biased), ops.NO_BIASES)
        self._act_home: dict[str, Any] = {"": activation}  # likewise; a dict also hides what is no module of this one
        self._act_name = ""
        if isinstance(activation, nn.Module) and own:
            _add_module(self, act_path, activation)
            above, _, self._act_name = act_path.rpartition(".")
            self._act_home = self.get_submodule(above)._modules

    def _take_inline(self, biases: Mapping[str, nn.Parameter], dtype: torch.dtype) -> None:
        """This module stands where `fc1` stood and owns its bias; `down_stub` will stand where `fc2` did."""
        up, down = self.block.up.bias, self.block.down.bias
        self.register_parameter("bias", biases[up] if up else None)
        # In __dict__, not registered: it will be the layer's module, under fc2's name.
        self.__dict__["down_stub"] = Bias(biases[down] if down else None, dtype)

    @property
    def own_activation(self) -> ops.Activation:
        """The block's own activation. Its module keeps its stock name (`act` in GPT-2): this must not be one."""
        return self._act_home[self._act_name]  # type: ignore[no-any-return]

    def deciding_rows(self) -> torch.Tensor:
        """The matrix by which neurons fire, gate or else up, read from flash: [d_ffn, d_model]. Needs gate `all`."""
        assert self.engine is not None
        out: torch.Tensor | None = None
        with self.engine.pieces(torch.zeros(1, self.block.d_model), self.biases()) as pieces:
            for neurons, gate, up, _ in pieces:
                rows = up if gate is None else gate
                out = torch.empty(self.block.d_ffn, self.block.d_model, dtype=rows.dtype) if out is None else out
                out[neurons] = rows
        assert out is not None
        return out

    def biases(self) -> ops.Biases:
        """The stock biases, sliced for this block's parts, in the order of the rows on flash.

        While they do not change it is the same object every time, unless a gradient may have to pass.
        """
        if not self._homes:
            return ops.NO_BIASES
        if torch.is_grad_enabled():
            return self._made_biases()
        seen, made = self._biases
        for home, (bias, address, version) in zip(self._homes, seen, strict=True):
            now = home["bias"]
            if now is not bias or (now is not None and (now._version != version or now.data_ptr() != address)):
                break
        else:
            return made
        stored = [home["bias"] for home in self._homes]
        keys = [(None, 0, 0) if bias is None else (bias, bias.data_ptr(), bias._version) for bias in stored]
        self._biases = keys, self._made_biases()
        return self._biases[1]

    def _made_biases(self) -> ops.Biases:
        block = self.block
        gate = None if block.gate is None else self._stored(block.gate)
        up, down = self._stored(block.up), self._stored(block.down)
        if self.order is not None:
            gate, up = self._in_order(gate, False), self._in_order(up, True)
        return ops.Biases(gate, up, down)

    def _stored(self, part: Part) -> torch.Tensor | None:
        """The bias of one of the matrices, as the stock model has it."""
        return None if part.bias is None else part.bias_of(self._home(part)._parameters["bias"])

    def _home(self, part: Part) -> nn.Module:
        """The module that has the bias of one of the matrices."""
        if self.block.inline:
            owner: Any = self.down_stub if part is self.block.down else self
            return owner  # type: ignore[no-any-return]
        assert part.bias is not None
        return self.get_submodule(self._bias_path[part.bias].rpartition(".")[0])

    def _in_order(self, bias: torch.Tensor | None, is_up: bool) -> torch.Tensor | None:
        """A bias in the order of the rows; made anew when it changed, or when a gradient has to pass."""
        if bias is None:
            return None
        assert self.order is not None
        if torch.is_grad_enabled() and bias.requires_grad:
            return bias[self.order]
        key, ours = (bias.data_ptr(), bias._version, bias.dtype), self._ordered.get(is_up)
        if ours is None or ours[1].dtype != bias.dtype:
            with torch.inference_mode(False):  # its version is looked at, which a tensor from within does not have
                ours = None, bias.detach()[self.order]
        elif ours[0] != key:
            torch.index_select(bias.detach(), 0, self.order, out=ours[1])  # in place: who looks sees another version
        self._ordered[is_up] = key, ours[1]
        return ours[1]

    def forward(self, x: torch.Tensor, *residual: torch.Tensor) -> torch.Tensor:
        """The block's output; with a residual (Bloom, MPT) their sum, as the stock block returns it."""
        if is_compiling():
            return self._untraced(x, *residual)
        if not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
            y = self.decode(x)
        else:
            begun = self._begin(x, True)
            x = self.cast(x)
            with torch.autocast("cpu", enabled=False):  # gates and sums choose their own precision
                y = self._differentiable(x)
            self._end(begun)
        return y + residual[0] if residual and self.block.takes_residual else y

    def decode(self, x: torch.Tensor, biases: ops.Biases | None = None, begins: bool = True) -> torch.Tensor:
        """The block's output for who knows that no gradient, no autocast and no residual is asked for.

        Args:
            biases: what `biases` gave, if that is known.
            begins: False for who has called `begin_pass` already.
        """
        begun = self._begin(x, begins)
        if self.compute_dtype is not None:
            x = x.to(self.compute_dtype)
        assert self.engine is not None
        y = self.engine.forward(x, self._act_home[self._act_name], self.biases() if biases is None else biases)
        if begun:
            self._end(begun)
        return y

    def _begin(self, x: torch.Tensor, begins: bool) -> float:
        """Returns when, if somebody records that."""
        begun = 0.0 if trace.active is None else time.perf_counter()
        if self.engine is None:
            raise FlashError(
                f"{self.block.path} has no flash checkpoint behind it: load the model with from_pretrained, or "
                "call hf_flash.patch(model)."
            )
        if begins and self.begins_passes:
            self.begin_pass(x.numel() // x.shape[-1])
        return begun

    @property
    def native_act(self) -> ops.Activation | None:
        """`own_activation`, where native code may compute the whole block for a bfloat16 token; None where not."""
        return None if self.engine is None or self.compute_dtype is not None else self._act_home[self._act_name]

    @property
    def begins_passes(self) -> bool:
        """Whether a pass of the model, of its decoder, or of what guesses ahead, begins with this block."""
        return self.stats is not None or bool(self.on_pass)

    def _end(self, begun: float) -> None:
        if begun and trace.active is not None and self.engine is not None:
            trace.active.add(trace.FFN, begun, time.perf_counter(), self.block.path)
            self.engine.note_spans(trace.active)  # only now: it is not what is measured

    @torch.compiler.disable  # engines read files and keep books in numpy, which must not be traced
    def _untraced(self, x: torch.Tensor, *residual: torch.Tensor) -> torch.Tensor:
        return self.forward(x, *residual)

    def cast(self, x: torch.Tensor) -> torch.Tensor:
        """`x` in the dtype that the stock block would compute in."""
        return ops.autocast_input(x) if self.compute_dtype is None else x.to(self.compute_dtype)

    def begin_pass(self, n_tokens: int) -> None:
        """A pass of the model begins, if it `begins_passes`.

        Freed memory goes back to the system after a long one, and before the first.
        """
        if self.stats is not None:
            self.stats.add(n_tokens=n_tokens, n_forwards=1)
            if self.trim and (n_tokens <= MAX_TOKENS or self.stats.n_forwards == 1):
                trim_malloc()
            self.trim = n_tokens > MAX_TOKENS
        for call in self.on_pass:
            call(n_tokens)

    def _differentiable(self, x: torch.Tensor) -> torch.Tensor:
        """The block's output, with a gradient where one is wanted."""
        assert self.engine is not None
        trained = self._trained() if torch.is_grad_enabled() else []
        if torch.is_grad_enabled() and (x.requires_grad or trained):
            return _FlashFunction.apply(x, self, *trained)  # type: ignore[no-any-return]
        with torch.no_grad():
            return self.engine.forward(x, self.own_activation, self.biases())

    def _trained(self) -> list[nn.Parameter]:
        """Biases and parameters of the activation that want a gradient; the weights on flash are frozen."""
        stub = self.__dict__.get("down_stub")
        own = [*self.parameters(), *(stub.parameters() if stub is not None else ())]
        return [p for p in own if p.requires_grad]

    def extra_repr(self) -> str:
        b = self.block
        return f"d_model={b.d_model}, d_ffn={b.d_ffn}, gated={b.gate is not None}, engine={type(self.engine).__name__}"


class _FlashFunction(torch.autograd.Function):
    """The FFN as a function of its input and of what is trained in it; the backward pass reads the weights again.

    Nothing of the weights is saved between the passes: slots and ring buffers will hold other rows by then.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: FlashFFN, *trained: nn.Parameter) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.module, ctx.trained = module, trained
        assert module.engine is not None
        y = module.engine.forward(x, module.own_activation, module.biases())
        return y.clone() if y._is_view() else y  # Falcon adds in place, which autograd forbids on a view from here

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        module: FlashFFN = ctx.module
        assert module.engine is not None
        act = module.engine.activation(module.own_activation)
        sums = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in (x, *ctx.trained)]

        def add(y: torch.Tensor, leaf: torch.Tensor) -> None:
            parts = torch.autograd.grad(y, (leaf, *ctx.trained), grad, allow_unused=True)
            for total, part in zip(sums, parts, strict=True):
                if part is not None:
                    total += part

        with module.engine.pieces(x, module.biases()) as pieces, torch.enable_grad():
            for neurons, gate, up, down in pieces:
                leaf, biases = x.detach().requires_grad_(), module.biases()
                h = ops.hidden(leaf, up, act, gate, *biases.part(neurons))
                add(ops.project(h, down), leaf)
            down_bias = module.biases().down
            if down_bias is not None and down_bias.requires_grad:
                add(down_bias.to(grad.dtype).expand_as(grad), x.detach().requires_grad_())
        dx, *rest = (total.to(t.dtype) for total, t in zip(sums, (x, *ctx.trained), strict=True))
        return dx, None, *rest


def _add_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a dotted path, with empty modules for what lies between."""
    *parents, leaf = path.split(".")
    for name in parents:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = getattr(root, name)
    root.add_module(leaf, module)
