"""The hooks on a model: they put virtual tokens in the places of their placeholders, and check the inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..backbone.calls import CACHE_ARGUMENTS, ModuleCall, get_batch_size, parameter_names
from ..private import has_compiled_parts
from ..tuner.running import PerThread, Row, RunningCalls, pick_rows
from .embeddings import InputEmbeddings
from .places import Placeholders

# An adapter's name, where its virtual tokens stand, and which one stands there.
_Placed = tuple[str, Tensor, Tensor]
_IGNORED_LABEL = -100


class _Thread(PerThread):
    """The state of one thread: the places that were found in the running call of an embedding module."""

    placed: list[_Placed] | None = None


class PlaceholderHooks:
    """All hooks on one model.

    The embedding modules get hooks: the first one gives them a valid token id in the places of virtual tokens, the
    second one puts the virtual tokens into what they return. The model gets a hook that checks its inputs. Hooks are
    bound methods, not closures, so that a copied model has hooks of its own.

    Args:
        model: The model.
        embeddings: Its input embeddings.
        adapters: The placeholders of its adapters, by name.
        get_vectors: Returns the virtual tokens `[n, size]` of an adapter.
        calls: The running calls of the model.
        get_rows: Returns the adapters of each row for this thread.
        begin_forward: Called at the begin of each forward. Returns the same as `get_rows`.
    """

    def __init__(
        self,
        model: nn.Module,
        embeddings: InputEmbeddings,
        adapters: Mapping[str, Placeholders],
        get_vectors: Callable[[str], Tensor],
        calls: RunningCalls,
        get_rows: Callable[[], list[Row]],
        begin_forward: Callable[[], list[Row]],
    ):
        self.model, self._embeddings, self._adapters, self._calls = model, embeddings, adapters, calls
        self._get_vectors, self._get_rows, self._begin_forward = get_vectors, get_rows, begin_forward
        self._names = parameter_names(model) or ["input_ids"]
        self._own_ids = _find_own_ids(getattr(model, "config", None), embeddings.vocabulary)
        self._thread = _Thread()
        # The same as `_Thread.placed`, for a graph that is being compiled.
        self._traced: list[_Placed] | None = None
        self._hooked: list[nn.Module] = []
        self._handles: list[RemovableHandle] = []
        self._handle = model.register_forward_pre_hook(self._before_model, with_kwargs=True)

    # ---- Hooks come and go

    def attach(self) -> None:
        """Add the hooks to the embedding modules of the model, if they have none: wrappers of PEFT may be new."""
        found = self._embeddings.find()
        if [*map(id, found)] == [*map(id, self._hooked)]:
            return
        self.detach()
        self._hooked = found
        for module in found:
            self._handles.append(module.register_forward_pre_hook(self._before_embedding, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after_embedding))
        for table in self._embeddings.find_other_tables():
            self._handles.append(table.register_forward_pre_hook(self._before_other_table, with_kwargs=True))
        self._forget_graphs()

    def detach(self) -> None:
        """Remove the hooks from the embedding modules. A copy that PEFT makes of such a module has none then."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._hooked = [], []

    def remove(self) -> None:
        """Remove all hooks. The model is then as it was before."""
        self.detach()
        self._handle.remove()
        self._forget_graphs()

    def _forget_graphs(self) -> None:
        if has_compiled_parts(self.model):
            torch.compiler.reset()

    # ---- A call of an embedding module

    def _before_embedding(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Replace placeholders by a token id that the module has a row for."""
        placed = None
        ids = args[0] if args else kwargs.get("input")
        rows = self._get_rows()
        if any(rows) and isinstance(ids, Tensor) and not ids.is_floating_point():
            placed = self._place(ids, rows)
            for _, found, _ in placed:
                ids = ids.masked_fill(found, 0)
        self._keep(placed)
        if not placed:
            return None
        return ((ids, *args[1:]), kwargs) if args else (args, {**kwargs, "input": ids})

    def _after_embedding(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Put the virtual tokens into the output `[..., tokens, size]` of an embedding module."""
        placed = self._traced if torch.compiler.is_compiling() else self._thread.placed
        self._keep(None)
        for name, found, which in placed or ():
            vectors = self._get_vectors(name).to(output.device, output.dtype)
            chosen = F.embedding(which.masked_fill(~found, 0), vectors)
            output = torch.where(found.unsqueeze(-1), chosen, output)
        return output

    def _before_other_table(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Replace placeholders for which another table has no row. An index that it has stays."""
        rows = self._get_rows()
        ids, count = args[0] if args else None, len(module.weight)  # type: ignore[arg-type]
        if not any(rows) or not isinstance(ids, Tensor) or ids.is_floating_point():
            return None
        for _, found, _ in self._place(ids, rows):
            ids = ids.masked_fill(found & (ids >= count), 0)
        return (ids, *args[1:]), kwargs

    def _keep(self, placed: list[_Placed] | None) -> None:
        """Keep what `_before_embedding` has found for `_after_embedding`, which sees the replaced ids only."""
        if torch.compiler.is_compiling():
            self._traced = placed
        else:
            self._thread.placed = placed

    def _place(self, ids: Tensor, rows: list[Row]) -> list[_Placed]:
        """Find the places of virtual tokens among token ids `[batch, ..., tokens]`."""
        placed = []
        for name in dict.fromkeys(active.adapter for row in rows for active in row):
            found, which = self._adapters[name].find(ids)
            entries = [int(any(active.adapter == name for active in row)) for row in rows]
            picked = pick_rows(entries, ids)
            if picked is not None:
                found = found & picked.bool().view(-1, *[1] * (ids.dim() - 1))
            placed.append((name, found, which))
        return placed

    # ---- A forward of the model

    def _before_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Check the inputs, and leave virtual tokens out of the loss."""
        rows, call = self._begin_forward(), ModuleCall(self._names, args, kwargs)
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if not traced:
            self.attach()
            running = self._calls.current
            if running is not None and running.mixed and running.count_rows:
                batch = get_batch_size(call, str(getattr(self.model, "main_input_name", "input_ids")))
                if batch is not None:
                    running.check_row_count(batch, replica=module is not self.model)
            self.check_inputs(call, rows)
        if any(rows):
            self._leave_out_of_loss(call, rows)
        return call.arguments()

    def _leave_out_of_loss(self, call: ModuleCall, rows: list[Row]) -> None:
        """Set the labels of a language model to -100 in the places of virtual tokens: no word stands there."""
        labels, ids = call.get("labels"), call.get("input_ids")
        if not isinstance(labels, Tensor) or labels.is_floating_point() or not self._has_language_head():
            return
        is_decoder_input = bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))
        if not is_decoder_input and (not isinstance(ids, Tensor) or ids.shape != labels.shape):
            return
        for _, found, _ in self._place(labels if is_decoder_input else ids, rows):
            labels = labels.masked_fill(found if is_decoder_input else found & (labels == ids), _IGNORED_LABEL)
        call.set("labels", labels)

    def _has_language_head(self) -> bool:
        model: Any = self.model
        try:
            return model.get_output_embeddings() is not None
        except (AttributeError, NotImplementedError):
            return False

    def check_inputs(self, call: ModuleCall, rows: list[Row]) -> None:
        """Check that the inputs of a forward have placeholders that the adapters of their rows know.

        A step of `generate` with a cache has none. On an accelerator the check waits for the token ids.

        Args:
            call: The call of the model.
            rows: The adapters of each row.

        Raises:
            ValueError: If a row with an adapter has no placeholder, or as many as it must not have; if there are no
                token ids; or if a token id is beyond the vocabulary and no placeholder.
        """
        given = [call.get(name) for name in ("input_ids", "decoder_input_ids")]
        sides = [ids for ids in given if isinstance(ids, Tensor) and ids.dim() and not ids.is_floating_point()]
        goes_on = call.get("encoder_outputs") is not None
        if any(cache is not None for cache in map(call.get, CACHE_ARGUMENTS)):
            if all(ids.shape[-1] == 1 for ids in sides):
                return
            goes_on = goes_on or _has_past(call)
        if not sides:
            if any(rows) and not goes_on:
                raise ValueError(
                    "The model was called without token ids, and nothing else tells where virtual tokens stand. Pass "
                    "`input_ids`. To pass embeddings, take those of `model.get_input_embeddings()(input_ids)`, which "
                    "has the virtual tokens in it, and call the model in `model.disable_adapter()`."
                )
            return
        counts, strange = None, []
        for ids in sides:
            placed = self._place(ids, rows)
            known = torch.zeros_like(ids, dtype=torch.bool)
            for _, found, _ in placed:
                known = known | found
            unknown = (ids >= self._embeddings.vocabulary) & ~known
            for own in self._own_ids:
                unknown = unknown & (ids != own)
            strange.append(unknown.any())
            number = self._count(ids, rows)
            counts = number if counts is None or counts.shape != number.shape else counts + number
        assert counts is not None
        wanted = self._get_wanted(rows, counts)
        wrong = (counts < wanted[0]) | (counts > wanted[1])
        if goes_on:
            wrong = wrong & (counts > 0)
        has_strange, is_wrong = torch.stack([torch.stack(strange).any(), wrong.any()]).tolist()
        if has_strange:
            self._raise_for_unknown(sides, rows)
        if is_wrong:
            row = int(wrong.flatten().nonzero()[0])
            self._raise_for_count(rows, row * len(rows) // counts.numel(), int(counts.flatten()[row]))

    def _count(self, ids: Tensor, rows: list[Row]) -> Tensor:
        """The number of placeholders in each row `[batch, ...]`, also of those that are one too many."""
        number = torch.zeros(ids.shape[:-1], dtype=torch.long, device=ids.device)
        for name, found, _ in self._place(ids, rows):
            adapter = self._adapters[name]
            if adapter.are_counted:
                many = (ids == adapter.ids[0]).sum(-1)
                found = found.any(-1, keepdim=True)
                number = number + torch.where(found.squeeze(-1), many, 0)
            else:
                number = number + found.sum(-1)
        return number

    def _get_wanted(self, rows: list[Row], counts: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest number of placeholders of each row `[batch, ...]`."""
        most = torch.iinfo(torch.long).max
        bounds = []
        for row in rows:
            adapters = [self._adapters[active.adapter] for active in row]
            if adapters and all(adapter.are_counted for adapter in adapters):
                total = sum(adapter.count for adapter in adapters)
                bounds.append((total, total))
            else:
                bounds.append((int(bool(adapters)), most))
        limits = torch.tensor(bounds, device=counts.device)
        limits = limits.repeat_interleave(len(counts) // len(rows), 0) if counts.dim() else limits
        shape = (-1, *[1] * (counts.dim() - 1)) if counts.dim() else ()
        return limits[:, 0].view(shape), limits[:, 1].view(shape)

    def _raise_for_unknown(self, sides: list[Tensor], rows: list[Row]) -> None:
        vocabulary = self._embeddings.vocabulary
        ids = sorted({int(each) for side in sides for each in side.flatten().tolist() if each >= vocabulary})
        known = {name: adapter.ids for name, adapter in self._adapters.items()}
        active = sorted({active.adapter for row in rows for active in row})
        shown = ", ".join(f"{_describe_ids(known[name])} of adapter {name!r}" for name in active)
        raise ValueError(
            f"The inputs have the token ids {_describe_ids(tuple(ids))}, beyond the {vocabulary} rows of the input "
            f"embeddings. The placeholders of this call are {shown or 'none, because no adapter is active'}. Rows "
            "without an adapter need inputs without placeholders."
        )

    def _raise_for_count(self, rows: list[Row], row: int, count: int) -> None:
        names = [active.adapter for active in rows[row]]
        described = ", ".join(f"{name!r} ({_describe_ids(self._adapters[name].ids)})" for name in names)
        counted = all(self._adapters[name].are_counted for name in names)
        wanted = f"{sum(self._adapters[name].count for name in names)} " if counted else ""
        raise ValueError(
            f"A row of the inputs has {count or 'no'} placeholder{'' if count == 1 else 's'} of adapter {described}, "
            f"and needs {wanted or 'at least one'}{'of them' if counted else ''}. Was the text cut off? Put the token "
            "ids where virtual tokens are to stand. For a row without virtual tokens use `adapter_names` with "
            "'__base__', or `disable_adapter`."
        )


def _has_past(call: ModuleCall) -> bool:
    """Whether the cache of a call has tokens."""
    for name in CACHE_ARGUMENTS:
        get_length = getattr(call.get(name), "get_seq_length", None)
        if get_length is not None:
            return bool(get_length() > 0)
    return any(call.get(name) for name in CACHE_ARGUMENTS)


def _find_own_ids(config: Any, vocabulary: int) -> list[int]:
    """Token ids beyond the vocabulary that a model handles itself: the places of images in some models."""
    values: Iterable[Any] = vars(config).items() if config is not None else ()
    return sorted(
        {
            value
            for name, value in values
            if isinstance(value, int) and value >= vocabulary and ("token_id" in name or "token_index" in name)
        }
    )


def _describe_ids(ids: tuple[int, ...]) -> str:
    if len(ids) > 1 and ids == tuple(range(ids[0], ids[0] + len(ids))):
        return f"{ids[0]} to {ids[-1]}"
    return ", ".join(map(str, ids[:20])) + (" ..." if len(ids) > 20 else "")
