"""transformers' server with OpenAI's protocol, for a base model and adapters that share it.

`transformers serve` reads an adapter's folder as a model of its own. Here its handlers receive the base model and each
adapter under a name of its own, from a model manager that has loaded them.
"""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from jinja2 import TemplateError
from peft import PeftModel
from transformers import GenerationConfig
from transformers.utils.import_utils import is_serve_available

from ..config import PrefixTuningV2Config
from ..messages import shorten
from .saved import open_adapter

if not is_serve_available():
    raise ImportError("The server needs more packages: pip install 'prefix-adapter[serve]'")

import uvicorn
from fastapi import FastAPI
from fastapi.requests import Request
from fastapi.responses import JSONResponse

try:
    from transformers import ContinuousBatchingConfig
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import BaseGenerateManager, CBGenerateManager, GenerationState, Modality
except ImportError as error:
    raise ImportError("The server needs transformers 5.24 or later.") from error

_log = logging.getLogger(__name__)
# The name of no adapter in `adapter_names`.
_BASE = "__base__"
# What transformers raises for a request with a wrong value, before and while it computes an answer.
_WRONG_VALUE = (ValueError, TypeError, KeyError, TemplateError)


class UnknownModelError(ValueError):
    """A request names a model that is not served."""


class ServedModel:
    """The base model with one of its adapters, or none, in every call. All other attributes are the base model's.

    Args:
        model: The model with all adapters.
        adapter: The adapter's name in it, or `"__base__"`.
    """

    def __init__(self, model: PeftModel, adapter: str):
        self._model, self._names = model, [adapter]
        self._base: Any = model.get_base_model()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of a batch of one row."""
        return self._model(*args, adapter_names=self._names, **kwargs)

    def generate(self, **kwargs: Any) -> Any:
        """`generate` for a batch of one row."""
        return self._model.generate(adapter_names=self._names, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """A manager whose requests all get the adapter."""
        with self._use_adapter():
            return self._base.init_continuous_batching(*args, **kwargs)

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Continuous batching of requests that all get the adapter."""
        with self._use_adapter():
            return self._base.generate_batch(*args, **kwargs)

    def _use_adapter(self) -> AbstractContextManager[Any]:
        tuner: Any = self._model.base_model
        context: AbstractContextManager[Any] = tuner._enable_peft_forward_hooks(adapter_names=self._names)
        return context


class AdapterManager(ModelManager):
    """The models of a server: a base model and its adapters. They are loaded once, and stay.

    Args:
        base: The base model: a folder or a name on the Hub. It is served under this name.
        adapters: The folder, or the name on the Hub, of each adapter, by the name under which it is served.
        **options: Arguments of transformers' `ModelManager`, such as `device` and `dtype`.

    Raises:
        ValueError: If an adapter is damaged, belongs to another method or task, or does not fit the base model.
        OSError: If the base model is not found.
    """

    def __init__(self, base: str, adapters: Mapping[str, str], **options: Any):
        super().__init__(model_timeout=-1, **options)
        model, self.processor = super().load_model_and_processor(super().process_model_name(base))
        self._base = model
        self.served: dict[str, Any] = {base: model}
        if not adapters:
            return
        peft_model: Any = None
        for number, (name, folder) in enumerate(adapters.items()):
            saved = open_adapter(folder, PrefixTuningV2Config)
            if saved.task_type not in (None, "CAUSAL_LM"):
                raise ValueError(
                    f"{folder} is an adapter for {saved.task_type}, and a server of text needs CAUSAL_LM."
                )
            inner = f"adapter{number}"  # a name with dots is none for PEFT
            if peft_model is None:
                peft_model = PeftModel.from_pretrained(model, folder, inner, torch_device=str(model.device))
                self.served[base] = ServedModel(peft_model, _BASE)
            else:
                peft_model.load_adapter(folder, inner, torch_device=str(model.device))
            if saved.config.prefix_projection:
                peft_model.base_model.fold_adapter(inner)
            self.served[name] = ServedModel(peft_model.eval(), inner)

    def process_model_name(self, model_id: str) -> str:  # type: ignore[override]
        """The name of a served model, as it is."""
        return model_id

    def load_model_and_processor(
        self,
        model_id_and_revision: str,
        progress_callback: Callable[..., None] | None = None,
        tqdm_class: type | None = None,
        gguf_file: str | None = None,
    ) -> tuple[Any, Any]:
        """The served model of this name, and the base model's tokenizer or processor.

        Raises:
            UnknownModelError: If there is none. transformers' manager would load any model of the Hub.
        """
        if gguf_file is not None or model_id_and_revision not in self.served:
            known = ", ".join(self.served)
            raise UnknownModelError(f"There is no model {shorten(model_id_and_revision)!r} here, only {known}.")
        if progress_callback is not None:
            progress_callback({"status": "ready", "model": model_id_and_revision, "cached": True})
        return self.served[model_id_and_revision], self.processor

    def get_model_modality(self, model: Any, processor: Any = None) -> Modality:  # type: ignore[override]
        """What the base model reads: text, or images and sound too."""
        return ModelManager.get_model_modality(self._base, processor)

    def list_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """The served models, as `/v1/models` lists them."""
        common = {"object": "model", "created": 0, "owned_by": "local", "status": {"value": "loaded"}}
        return [{"id": name, **common} for name in self.served]

    def shutdown(self) -> None:
        """The models stay until the process ends: a request to `/reset` unloads none."""


class GenerationStates(GenerationState):
    """The managers that generate text, one for each model.

    transformers' class has one manager of continuous batching, and stops it when a request names another model.

    Args:
        continuous_batching: Whether requests are answered by continuous batching.
        settings: The settings of continuous batching.
    """

    def __init__(self, continuous_batching: bool, settings: ContinuousBatchingConfig):
        super().__init__(continuous_batching=continuous_batching)
        self._settings, self._managers = settings, dict[str, CBGenerateManager]()

    def get_manager(self, model_id: str, use_cb: bool = False) -> BaseGenerateManager:
        """The manager of a model."""
        if not use_cb:
            return super().get_manager(model_id)
        if model_id not in self._managers:
            self._managers[model_id] = CBGenerateManager(cb_config=copy.deepcopy(self._settings))
        return self._managers[model_id]

    def is_cb_alive(self) -> bool:
        """Whether all managers of continuous batching work."""
        return all(manager.is_alive() for manager in self._managers.values())

    def shutdown(self) -> None:
        """Stop all managers of continuous batching."""
        for manager in self._managers.values():
            manager.stop()


def make_app(
    base: str,
    adapters: Mapping[str, str],
    continuous_batching: bool = False,
    num_blocks: int | None = None,
    **options: Any,
) -> FastAPI:
    """Load a base model and adapters, and make the application that serves them.

    Args:
        base: The base model: a folder or a name on the Hub. It is served under this name.
        adapters: The folder, or the name on the Hub, of each adapter, by the name under which it is served.
        continuous_batching: Whether requests are answered by transformers' continuous batching.
        num_blocks: The blocks of each model's cache in continuous batching; by default as many as fit into an equal
            share of the memory that is free.
        **options: Arguments of transformers' `ModelManager`, such as `device` and `dtype`.

    Raises:
        ValueError: If an adapter cannot be served, or continuous batching does not work with one.
        OSError: If the base model is not found.
    """
    manager = AdapterManager(base, adapters, continuous_batching=continuous_batching, **options)
    share = None if num_blocks else 0.8 / len(manager.served)
    settings = ContinuousBatchingConfig(num_blocks=num_blocks, max_memory_percent=share, auto_switch_to_flash=False)
    states = GenerationStates(continuous_batching, settings)
    for name, model in manager.served.items():
        if states.use_continuous_batching(model, manager.get_model_modality(model, manager.processor)):
            try:  # now, or each request would fail
                _try_continuous_batching(model)
            except ValueError as error:
                raise ValueError(f"{name} cannot be served with continuous batching. {error}") from error
            gc.collect()  # the cache is in a cycle of references
    tokenizer = getattr(manager.processor, "tokenizer", manager.processor)
    app = build_server(
        manager,
        _follow_protocol(ChatCompletionHandler(manager, states), tokenizer),
        _follow_protocol(CompletionHandler(manager, states), tokenizer),
        _follow_protocol(ResponseHandler(manager, states), tokenizer),
        TranscriptionHandler(manager, states),
        SystemOneHandler(manager, states),
        generation_state=states,
    )
    app.add_exception_handler(UnknownModelError, _answer_unknown)
    app.state.generation = states
    return app


def _try_continuous_batching(model: Any) -> None:
    """Answer one request of one token, on a small cache.

    transformers' engine takes any model, and if it fails, then in each request.

    Raises:
        ValueError: If the engine fails, or takes no prefix.
    """
    one_token = GenerationConfig(max_new_tokens=1, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(
        num_blocks=8, max_batch_tokens=64, max_requests_per_batch=1, auto_switch_to_flash=False
    )
    results = model.generate_batch([[0]], one_token, continuous_batching_config=small, warmup=False).values()
    errors = [result.error for result in results if result.error] or ([] if results else ["no answer"])
    if errors:
        raise ValueError(
            f"transformers' engine of continuous batching fails with {model.config.model_type} ({errors[0]}). Serve "
            "it without --continuous_batching."
        )


def _follow_protocol(handler: Any, tokenizer: Any) -> Any:
    """The handler, which then answers as OpenAI's clients expect: wrong requests with status 400 and the reason.

    transformers' own answer to most of them is a bare 500, after which it closes the connection.
    """
    handle = handler.handle_request

    async def handle_request(body: dict[str, Any], request_id: str) -> Any:
        body.setdefault("stream", False)  # OpenAI's default; transformers streams a response if nothing is said
        try:
            _check_request(body, tokenizer)
            return await handle(body, request_id)
        except UnknownModelError:
            raise
        except _WRONG_VALUE as error:
            _log.warning("A request was rejected.", exc_info=True)
            return _make_error(400, str(error))

    handler.handle_request = handle_request
    return handler


def _check_request(body: dict[str, Any], tokenizer: Any) -> None:
    """Check what transformers' handlers do not.

    Raises:
        ValueError: If a value is wrong.
    """
    if not isinstance(body.get("model"), str):
        raise ValueError("`model` must be the name of a served model.")
    messages = body.get("messages", [{}])
    if not (isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)):
        raise ValueError("`messages` must be a list of one or more objects with `role` and `content`.")
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if body.get(name) is not None and not (isinstance(body[name], int) and body[name] > 0):
            raise ValueError(f"`{name}` must be a number of one or more tokens, got {shorten(str(body[name]))}.")
    if body.get("prompt") == "" and not tokenizer("")["input_ids"]:
        raise ValueError("`prompt` is empty, and the model begins with no token of its own.")


def _make_error(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    """An error in the form that OpenAI's clients expect."""
    body = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return JSONResponse({"error": body}, status_code=status)


def _answer_unknown(request: Request, error: Exception) -> JSONResponse:
    """The answer to a request that names no served model."""
    return _make_error(404, str(error), "model", "model_not_found")


def serve(base: str, adapters: Mapping[str, str], host: str, port: int, **options: Any) -> None:
    """Serve a base model and adapters until the process is stopped.

    Args:
        base: As for `make_app`.
        adapters: As for `make_app`.
        host: The address to listen on.
        port: The port to listen on.
        **options: Further arguments of `make_app`.
    """
    app = make_app(base, adapters, **options)
    try:
        uvicorn.run(app, host=host, port=port)
    finally:
        app.state.generation.shutdown()
