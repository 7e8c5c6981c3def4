"""The hooks on a model: they put virtual tokens in the places of their placeholders, and check the inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..backbone.calls import CACHE_ARGUMENTS, ModuleCall, get_batch_size, parameter_names
from ..backbone.probe import is_probing
from ..private import has_compiled_parts
from ..tuner.running import PerThread, Row, RunningCalls, pick_rows
from ..tuner.wrapping import WrappedForward, WrappedForwards
from .embeddings import InputEmbeddings
from .places import Placeholders

# An adapter's name, where its virtual tokens stand, and which one stands there.
_Placed = tuple[str, Tensor, Tensor]
_IGNORED_LABEL = -100
# What a model is given from its earlier calls: a cache, or a state of its own (RWKV, XLNet).
_PAST_ARGUMENTS = (*CACHE_ARGUMENTS, "cache_params", "state", "mems")


class _Thread(PerThread):
    """The state of one thread: the copy of an embedding module that `nn.DataParallel` is about to call in it."""

    replica: nn.Module | None = None


class PlaceholderHooks:
    """All hooks on one model.

    The `forward` of the embedding modules is wrapped on the instance, in order to put virtual tokens into what it
    returns. The model gets a hook that checks its inputs. Hooks are bound methods, not closures, so that a copied
    model has hooks of its own.

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
        self._thread, self._wrapped = _Thread(), WrappedForwards()
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
            self._handles.append(module.register_forward_pre_hook(self._note_replica))
            self._wrapped.wrap(module, self._embed)
        for table in self._embeddings.find_other_tables():
            self._handles.append(table.register_forward_pre_hook(self._before_other_table))
        for part in self._embeddings.parts:
            self._handles.append(part.register_forward_pre_hook(self._before_part))
        self._forget_graphs()

    def detach(self) -> None:
        """Remove the hooks from parts of the model. A copy that PEFT makes of such a part has none then."""
        for handle in self._handles:
            handle.remove()
        self._wrapped.remove()
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

    def _note_replica(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Note a replica that `nn.DataParallel` calls: its wrapped forward is that of the original."""
        if not torch.compiler.is_compiling() and all(module is not own for own in self._hooked):
            self._thread.replica = module

    def _embed(self, wrapped: WrappedForward, *args: Any, **kwargs: Any) -> Any:
        """The forward of an embedding module: virtual tokens stand in the places of their placeholders.

        The module itself is given another token id there, which it has a row for.
        """
        replica = None
        if not torch.compiler.is_compiling():
            replica, self._thread.replica = self._thread.replica, None
        forward, rows = wrapped.get_unwrapped(replica), self._get_rows()
        ids = args[0] if args else kwargs.get("input")
        if wrapped.is_removed or not any(rows) or not _are_ids(ids):
            return forward(*args, **kwargs)
        placed = self._place(ids, rows)
        for _, found, _ in placed:
            ids = ids.masked_fill(found, 0)
        output = forward(ids, *args[1:]) if args else forward(**{**kwargs, "input": ids})
        for name, found, which in placed:
            vectors = self._get_vectors(name).to(output.device, output.dtype)
            chosen = F.embedding(which.masked_fill(~found, 0), vectors)
            output = torch.where(found.unsqueeze(-1), chosen, output)
        return output

    def _before_other_table(self, module: nn.Embedding, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Replace placeholders for which another table has no row. An index that it has stays."""
        names = {active.adapter for row in self._get_rows() for active in row}
        if not names or not args or not _are_ids(args[0]):
            return None
        ids = args[0]
        for name in names:
            ids = ids.masked_fill(self._adapters[name].contain(ids) & (ids >= module.num_embeddings), 0)
        return (ids, *args[1:])

    def _before_part(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Add the hooks that are missing. `generate` calls an encoder before it calls the whole model."""
        if not torch.compiler.is_compiling() and not torch.jit.is_tracing():
            self.attach()

    def _place(self, ids: Tensor, rows: list[Row]) -> list[_Placed]:
        """Find the places of virtual tokens among token ids `[batch, ..., tokens]`."""
        return [
            (name, _only(found, in_rows), which)
            for name, in_rows in self._get_adapters(ids, rows)
            for found, which in [self._adapters[name].find(ids)]
        ]

    def _get_adapters(self, ids: Tensor, rows: list[Row]) -> list[tuple[str, Tensor | None]]:
        """The adapters of a batch of token ids, and which of its rows have each of them; `None` if all have it."""
        adapters = []
        for name in dict.fromkeys(active.adapter for row in rows for active in row):
            in_rows = pick_rows([int(any(active.adapter == name for active in row)) for row in rows], ids)
            adapters.append((name, None if in_rows is None else in_rows.bool()))
        return adapters

    # ---- A forward of the model

    def _before_model(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Check the inputs, and leave virtual tokens out of the loss."""
        rows, call = self._begin_forward(), ModuleCall(self._names, args, kwargs)
        if not torch.compiler.is_compiling() and not torch.jit.is_tracing():
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
        if not _are_ids(labels) or not self._has_language_head():
            return
        left_out = self._find_members(labels, rows)
        if not self._is_encoder_decoder:
            # The id of a real word may be a placeholder too, and a label elsewhere.
            beyond = labels >= self._embeddings.vocabulary
            same = labels == ids if _are_ids(ids) and ids.shape == labels.shape else beyond
            left_out = left_out & (beyond | same)
        call.set("labels", labels.masked_fill(left_out, _IGNORED_LABEL))

    @property
    def _is_encoder_decoder(self) -> bool:
        return bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))

    def _has_language_head(self) -> bool:
        model: Any = self.model
        try:
            return model.get_output_embeddings() is not None
        except (AttributeError, NotImplementedError):
            return False

    # ---- The check of the inputs

    def check_inputs(self, call: ModuleCall, rows: list[Row]) -> None:
        """Check that the inputs of a forward have placeholders that the adapters of their rows know.

        A step of `generate` with a cache needs none. On an accelerator the check waits for the token ids.

        Args:
            call: The call of the model.
            rows: The adapters of each row.

        Raises:
            ValueError: If a row with an adapter has no placeholder, or not as many as there are virtual tokens if
                they are counted; if there are no token ids; if a token id is beyond the vocabulary and no
                placeholder; or if placeholders in the labels of an encoder-decoder would be lost.
        """
        if is_probing():
            return
        given = [call.get(name) for name in ("input_ids", "decoder_input_ids")]
        sides = [ids.reshape(-1, ids.shape[-1]) for ids in given if _are_ids(ids)]
        goes_on = call.get("encoder_outputs") is not None
        past = call.get_first(_PAST_ARGUMENTS)
        if past is not None:
            if sides and all(ids.shape[-1] == 1 for ids in sides):
                return
            goes_on = goes_on or _has_past(past)
        if not sides:
            if any(rows) and not goes_on:
                raise ValueError(
                    "The model was called without token ids, and nothing else tells where virtual tokens stand. Pass "
                    "`input_ids`. To pass embeddings, take those of `model.get_input_embeddings()(input_ids)`, which "
                    "has the virtual tokens in it, and call the model in `model.disable_adapter()`."
                )
            return
        members = [self._find_members(ids, rows) for ids in sides]
        unknown = [self._find_unknown(ids) & ~found for ids, found in zip(sides, members, strict=True)]
        counts = [found.sum(-1) for found in members]
        count = torch.stack([each for each in counts if len(each) == len(counts[0])]).sum(0)
        least, most = self._get_bounds(rows, count)
        wrong = (count < least) | (count > most)
        if goes_on:
            wrong = wrong & (count > 0)
        labels = call.get("labels")
        made = self._is_encoder_decoder and _are_ids(labels) and len(given) > 1 and given[1] is None
        lost = self._find_members(labels, rows) if made else wrong[:0]
        problems = [torch.cat([each.flatten() for each in unknown]).any(), wrong.any(), lost.any()]
        has_unknown, is_wrong, has_lost = torch.stack(problems).tolist()
        if has_unknown:
            self._raise_for_unknown(torch.cat([ids[each] for ids, each in zip(sides, unknown, strict=True)]), rows)
        if is_wrong:
            first = int(wrong.nonzero()[0])
            self._raise_for_count(rows[first * len(rows) // len(count)], int(count[first]))
        if has_lost:
            raise ValueError(
                "The labels have placeholders, and the model would make the inputs of its decoder from the labels, "
                "where virtual tokens have no place. Pass `decoder_input_ids` too."
            )

    def _find_members(self, ids: Tensor, rows: list[Row]) -> Tensor:
        """Whether token ids `[batch, ..., tokens]` are placeholders of the adapters of their rows."""
        found = torch.zeros_like(ids, dtype=torch.bool)
        for name, in_rows in self._get_adapters(ids, rows):
            found = found | _only(self._adapters[name].contain(ids), in_rows)
        return found

    def _find_unknown(self, ids: Tensor) -> Tensor:
        """Whether the model has no row for token ids, and does not handle them itself."""
        unknown = ids >= self._embeddings.vocabulary
        for own in self._own_ids:
            unknown = unknown & (ids != own)
        return unknown

    def _get_bounds(self, rows: list[Row], count: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest number of placeholders that each row of a batch may have."""
        bounds = []
        for row in rows:
            adapters = [self._adapters[active.adapter] for active in row]
            exact = _count_places(adapters)
            bounds.append((exact or bool(adapters), exact or torch.iinfo(torch.long).max))
        least, most = torch.tensor(bounds, device=count.device).repeat_interleave(len(count) // len(rows), 0).unbind(1)
        return least, most

    def _raise_for_unknown(self, unknown: Tensor, rows: list[Row]) -> None:
        ids = tuple(sorted(set(unknown.tolist())))
        active = sorted({active.adapter for row in rows for active in row})
        shown = ", ".join(f"{_describe_ids(self._adapters[name].ids)} of adapter {name!r}" for name in active)
        raise ValueError(
            f"The inputs have the token ids {_describe_ids(ids)}, beyond the {self._embeddings.vocabulary} rows of "
            f"the input embeddings. The placeholders of this call are {shown or 'none: no adapter is active'}. Rows "
            "without an adapter need inputs without placeholders."
        )

    def _raise_for_count(self, row: Row, count: int) -> None:
        adapters = {active.adapter: self._adapters[active.adapter] for active in row}
        described = " and ".join(f"{name!r} ({_describe_ids(each.ids)})" for name, each in adapters.items())
        raise ValueError(
            f"A row of the inputs has {count or 'no'} placeholder{'' if count == 1 else 's'} of adapter {described}, "
            f"and needs {_count_places(list(adapters.values())) or 'at least one'}. Was the text cut off? Put the "
            "token ids where virtual tokens are to stand. For a row without virtual tokens use `adapter_names` with "
            "'__base__', or `disable_adapter`."
        )


def _are_ids(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.dim() > 0 and not value.is_floating_point()


def _only(found: Tensor, in_rows: Tensor | None) -> Tensor:
    """The places `[batch, ..., tokens]` that are in some rows `[batch]` of a batch; in all of them if `None`."""
    return found if in_rows is None else found & in_rows.view(-1, *[1] * (found.dim() - 1))


def _count_places(adapters: list[Placeholders]) -> int:
    """The number of placeholders in a row, if the places of all adapters are counted; 0 if it may be any."""
    return sum(each.count for each in adapters) if all(each.are_counted for each in adapters) else 0


def _has_past(past: Any) -> bool:
    """Whether a cache, or another state of an earlier call, has tokens."""
    try:
        return bool(past.get_seq_length() > 0)
    except AttributeError:  # tensors, which are there from the second call on
        return past is not None
    except ValueError:  # a cache without layers of attention
        return bool(past.has_previous_state())


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
