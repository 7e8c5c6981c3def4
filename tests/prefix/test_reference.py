"""The prefix compared with references that share no code with the package, and properties of every prefix.

The references: P-Tuning v2 in plain tensor maths (`reference.py`), PEFT's own prefix tuning, and the backbone itself,
for which a prefix made of the keys and values of real tokens is the same as those tokens.
"""

import itertools
import re
from collections.abc import Callable

import peft
import pytest
import reference
import tiny
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutput

from prefix_adapter import PrefixTuningV2Config, get_peft_model

N = 5  # virtual tokens
TASKS = {
    "bert": "SEQ_CLS",
    "roberta": "SEQ_CLS",
    "gpt2": "CAUSAL_LM",
    "llama": "CAUSAL_LM",
    "t5": "SEQ_2_SEQ_LM",
    "bart": "SEQ_2_SEQ_LM",
}
CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
# PEFT warns about arguments that it ignores, transformers about tiny models.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

both_shifts = pytest.mark.parametrize("shift", [False, True], ids=["kept", "shifted"])
both_attentions = pytest.mark.parametrize("attn", ["eager", "sdpa"])


# ---- Helpers


def backbone(kind: str, attn: str | None = None, head: bool = True, **changes):
    """The tiny model with the head of its task, or without a head. Each call gives the same weights."""
    if kind == "t5":
        # With the factor 5 of `tiny`, a change of 1e-7 in the weights changes the logits by 1e-3.
        changes = {"initializer_factor": 1.0, **changes}
    return tiny.model(kind, CLASSES[TASKS[kind]] if head else "AutoModel", attn=attn, **changes)


def wrap(base: nn.Module, task: str | None = None, **config):
    """`base` with a prefix that has a large effect."""
    config = {"num_virtual_tokens": N, "prefix_dropout": 0.0, **config}
    model = get_peft_model(base, PrefixTuningV2Config(task_type=task, **config)).eval()
    tiny.randomize(prefix_of(model))
    return model


def wrapped(kind: str, attn: str | None = None, changes: dict | None = None, **config):
    return wrap(backbone(kind, attn, **changes or {}), TASKS[kind], **config)


def prefix_of(model: nn.Module) -> nn.Module:
    return model.base_model.model.prefix_tuning_v2


def set_table(model: nn.Module, table: Tensor) -> None:
    weight = prefix_of(model).prefix_tuning_v2_embedding["default"].weight
    assert weight.shape == table.shape  # otherwise `copy_` may broadcast
    with torch.no_grad():
        weight.copy_(table)


def prefix_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of all prefix parameters by name. None may be zero."""
    gradients = {name: parameter.grad for name, parameter in prefix_of(model).named_parameters()}
    assert gradients and all(g is not None and g.abs().max() > 0 for g in gradients.values())
    return gradients


def padded(kind: str, side: str | None, lengths: tuple[int, ...] = (7, 4), seed: int = 1) -> dict[str, Tensor]:
    """A batch with rows of these lengths, padded on `side`; without a side, full rows and no mask."""
    ids = tiny.ids(len(lengths), max(lengths), seed)
    if side is None:
        return {"input_ids": ids}
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, slice(length) if side == "right" else slice(max(lengths) - length, None)] = 1
    return {"input_ids": ids.masked_fill(mask == 0, tiny.config(kind).pad_token_id), "attention_mask": mask}


def batch(kind: str, side: str | None) -> dict[str, Tensor]:
    """`padded`, with the tokens of the decoder if the model has one."""
    inputs = padded(kind, side)
    if TASKS[kind] == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = tiny.ids(2, 6, seed=4)
    return inputs


def assert_equal(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Assert equality up to `tolerance`, relative to the largest element if that is above 1."""
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def assert_differ(one: Tensor, other: Tensor) -> None:
    """Assert that two outputs differ so much that a test for equality could fail."""
    assert (one - other).abs().max() > 1e-2


# ---- The paper


@both_shifts
@pytest.mark.parametrize("projection", [False, True], ids=["table", "mlp"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_paper(kind: str, projection: bool, shift: bool):
    encoder_hidden_size = 24 if projection else None
    model = wrapped(kind, prefix_projection=projection, encoder_hidden_size=encoder_hidden_size, shift_positions=shift)
    inputs = padded(kind, "right")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    weights = reference.weights_of(model)

    def loss(hidden: Tensor, logits: Tensor) -> Tensor:
        # The head's loss, and a weighted sum over all real tokens.
        directions = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5)) * mask.unsqueeze(-1)
        return nn.functional.cross_entropy(logits, torch.tensor([2, 0])) + (hidden * directions).mean()

    def forward(table: Tensor | None) -> tuple[Tensor, Tensor]:
        return reference.encoder(kind, model.config, weights, ids, mask, table, N if shift else 0)

    hidden, logits = forward(reference.prefix(weights))
    output = model(**inputs, output_hidden_states=True)
    real = mask.bool()
    assert_equal(output.hidden_states[-1][real], hidden[real])
    assert_equal(output.logits, logits)
    for ours, without in zip((hidden[real], logits), (lambda h, s: (h[real], s))(*forward(None)), strict=True):
        assert_differ(ours, without)

    loss(hidden, logits).backward()
    loss(output.hidden_states[-1], output.logits).backward()
    prefix_gradients(model)
    checked = 0
    for name, parameter in model.named_parameters():
        short = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        if short in weights and weights[short].requires_grad and "original_module" not in name:
            expected = weights[short].grad
            assert expected.abs().max() > 0, name
            # Relative to the size of the gradient, because gradients can be small.
            torch.testing.assert_close(
                parameter.grad, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item(), msg=name
            )
            checked += 1
    assert checked == (5 if projection else 1) + (2 if kind == "bert" else 4)


@pytest.mark.parametrize("kind", TASKS)
def test_only_prefix_and_head_are_trained(kind: str):
    model = wrapped(kind)
    parameters = dict(model.named_parameters())
    expected = {name for name in parameters if ".prefix_tuning_v2." in name or ".modules_to_save." in name}
    assert {name for name, parameter in parameters.items() if parameter.requires_grad} == expected


# ---- PEFT's prefix tuning


def columns_of_peft(kind: str, table: Tensor) -> Tensor:
    """PEFT's table in the order of this package.

    For an encoder-decoder PEFT doubles its table's 2L chunks and gives layer l of the decoder four of them, 4l to
    4l + 3 (modulo 2L), of which the first two are used.
    """
    if TASKS[kind] != "SEQ_2_SEQ_LM":
        return table
    chunks = table.chunk(2 * tiny.LAYERS, dim=1)
    picked = [chunks[(4 * layer + side) % len(chunks)] for layer in range(tiny.LAYERS) for side in (0, 1)]
    return torch.cat(picked, dim=1)


@pytest.mark.parametrize(
    "kind, side",
    # Encoders are padded on the right, because a head reads the first token.
    [(kind, side) for kind in TASKS for side in (None, "right", "left") if (TASKS[kind], side) != ("SEQ_CLS", "left")],
)
def test_peft_prefix_tuning(kind: str, side: str | None):
    theirs = peft.get_peft_model(
        backbone(kind), peft.PrefixTuningConfig(task_type=TASKS[kind], num_virtual_tokens=N)
    ).eval()
    table = theirs.prompt_encoder["default"].embedding.weight.detach()
    target = ["decoder"] if TASKS[kind] == "SEQ_2_SEQ_LM" else None
    ours = wrapped(kind, shift_positions=True, target_attention=target)
    set_table(ours, columns_of_peft(kind, table))

    inputs = batch(kind, side)
    with torch.no_grad():
        expected = reference.output_of_peft(theirs, **inputs).logits
        actual, without = (model(**inputs).logits for model in (ours, backbone(kind)))
    if TASKS[kind] == "CAUSAL_LM" and side is not None:
        real = inputs["attention_mask"].bool()
        actual, expected, without = actual[real], expected[real], without[real]
    assert_equal(actual, expected)
    assert_differ(expected, without)


def test_peft_prefix_projection():
    theirs = peft.get_peft_model(
        backbone("bert"),
        peft.PrefixTuningConfig(
            task_type="SEQ_CLS", num_virtual_tokens=N, prefix_projection=True, encoder_hidden_size=24
        ),
    ).eval()
    tiny.randomize(theirs.prompt_encoder)
    encoder = theirs.prompt_encoder["default"]
    ours = wrapped("bert", prefix_projection=True, encoder_hidden_size=24, shift_positions=True)
    layer = prefix_of(ours)
    layer.prefix_tuning_v2_embedding["default"].load_state_dict(encoder.embedding.state_dict())
    layer.prefix_tuning_v2_hidden["default"].load_state_dict(encoder.transform[0].state_dict())
    layer.prefix_tuning_v2_output["default"].load_state_dict(encoder.transform[2].state_dict())
    inputs = padded("bert", "right")
    with torch.no_grad():
        expected = reference.output_of_peft(theirs, **inputs).logits
        assert_equal(ours(**inputs).logits, expected)
        assert_differ(expected, backbone("bert")(**inputs).logits)


# ---- The backbone: a prefix of the keys and values of tokens p is those tokens, [p; x]

passes_parametrized = pytest.mark.parametrize("passes", ["no cache", "cache", "two turns"])


def decode(model: nn.Module, name: str, tokens: Tensor, passes: str, **inputs) -> Tensor:
    """The logits of `tokens`: in one pass with or without a cache, or the last three in a second pass."""
    if passes != "two turns":
        output = model(**{name: tokens}, use_cache=passes == "cache", **inputs)
        if passes == "cache":
            assert output.past_key_values.get_seq_length() == tokens.shape[1]  # the caller's cache stays unchanged
        return output.logits
    first = model(**{name: tokens[:, :-3]}, use_cache=True, **inputs)
    second = model(**{name: tokens[:, -3:]}, use_cache=True, past_key_values=first.past_key_values, **inputs)
    return torch.cat([first.logits, second.logits], dim=1)


def table_of(cache) -> Tensor:
    """The keys and values `[1, heads, n, size]` in a cache as a table `[n, columns]`."""
    states = [states for layer in cache.layers for states in (layer.keys, layer.values)]
    return torch.cat([s[0].transpose(0, 1).flatten(1) for s in states], dim=1)


@passes_parametrized
@both_shifts
@both_attentions
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@torch.no_grad()
def test_causal_prefix_is_tokens(kind: str, attn: str, shift: bool, passes: str):
    base = backbone(kind, attn)
    p, x = tiny.ids(1, N, seed=3), tiny.ids(2, 7)
    model = wrapped(kind, attn, shift_positions=shift)
    set_table(model, table_of(base(p, use_cache=True).past_key_values))

    both = torch.cat([p.expand(2, -1), x], dim=1)
    positions = torch.cat([torch.arange(N), torch.arange(7) + (N if shift else 0)]).expand(2, -1)
    # With a mask, because without one transformers takes positions that restart for a packed batch.
    expected = base(both, position_ids=positions, attention_mask=torch.ones_like(both)).logits[:, N:]
    assert_equal(decode(model, "input_ids", x, passes), expected)
    assert_differ(expected, base(x).logits)


@passes_parametrized
@both_attentions
@pytest.mark.parametrize("target", ["decoder", "cross"])
@pytest.mark.parametrize("kind, shift", [("t5", False), ("t5", True), ("bart", True)])
@torch.no_grad()
def test_decoder_prefix_is_tokens(kind: str, shift: bool, target: str, attn: str, passes: str):
    """The decoder's self-attention on [p; x], and its cross-attention on the encoder's states of [p; x]."""
    if kind == "bart" and target == "cross":
        shift = False  # cross-attention has no positions, and BART takes none as an argument
    base = backbone(kind, attn)
    model = wrapped(kind, attn, target_attention=[target], shift_positions=shift)
    encoder = base.get_encoder()
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    states_p, states = encoder(tiny.ids(1, N, seed=3))[0], encoder(tiny.ids(2, 6, seed=5), attention_mask=mask)[0]
    p, x = tiny.ids(1, N, seed=6), tiny.ids(2, 7)

    def given(states: Tensor) -> dict:
        return {"encoder_outputs": BaseModelOutput(last_hidden_state=states)}

    if target == "decoder":
        cache = base(**given(states[:1]), decoder_input_ids=p, use_cache=True).past_key_values
        # p sees the encoder's states of its row, here those of the first row for both.
        states, mask = states[:1].expand(2, -1, -1), mask[:1].expand(2, -1)
        set_table(model, table_of(cache.self_attention_cache))
        both = torch.cat([p.expand(2, -1), x], dim=1)
        expected = base(**given(states), attention_mask=mask, decoder_input_ids=both).logits[:, N:]
    else:
        cache = base(**given(states_p), decoder_input_ids=p, use_cache=True).past_key_values
        set_table(model, table_of(cache.cross_attention_cache))
        both, wide = torch.cat([states_p.expand(2, -1, -1), states], dim=1), nn.functional.pad(mask, (N, 0), value=1)
        expected = base(**given(both), attention_mask=wide, decoder_input_ids=x).logits
    actual = decode(model, "decoder_input_ids", x, passes, **given(states), attention_mask=mask)
    assert_equal(actual, expected)
    assert_differ(expected, base(**given(states), attention_mask=mask, decoder_input_ids=x).logits)


def encoder_table(encoder: nn.Module, p: Tensor) -> Tensor:
    """The keys and values of an encoder for the tokens p `[1, n]` as a table, from the layers that compute them."""
    columns: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda module, args, output: columns.append(output[0]))
        for name, module in encoder.named_modules()
        if re.search(r"\.(key|k|k_proj|value|v|v_proj)$", name)
    ]
    encoder(p)
    for handle in handles:
        handle.remove()
    return torch.cat(columns, dim=1)


def encode_behind(encoder: nn.Module, p: Tensor, x: Tensor, **inputs) -> Tensor:
    """An encoder's states of x in [p; x], under a mask that lets x see both, but p only itself."""
    both = torch.cat([p.expand(len(x), -1), x], dim=1)
    length = both.shape[1]
    hidden = torch.zeros(length, length, dtype=torch.bool)
    hidden[: p.shape[1], p.shape[1] :] = True
    mask = torch.zeros(len(x), 1, length, length).masked_fill(hidden, torch.finfo(torch.float32).min)
    return encoder(both, attention_mask=mask, **inputs)[0][:, p.shape[1] :]


@both_attentions
@pytest.mark.parametrize("kind, shift", [*itertools.product(["bert", "roberta", "t5"], [False, True]), ("bart", True)])
@torch.no_grad()
def test_encoder_prefix_is_tokens(kind: str, shift: bool, attn: str):
    base = backbone(kind, attn, head=False)
    encoder = base if TASKS[kind] == "SEQ_CLS" else base.get_encoder()
    p, x = tiny.ids(1, N, seed=3), tiny.ids(2, 7)
    inputs = {}
    if TASKS[kind] == "SEQ_CLS":
        first = 0 if kind == "bert" else base.config.pad_token_id + 1
        positions = torch.cat([torch.arange(N), torch.arange(7) + (N if shift else 0)])
        inputs["position_ids"] = (positions + first).expand(2, -1)
    expected = encode_behind(encoder, p, x, **inputs)

    two_sided = TASKS[kind] == "SEQ_2_SEQ_LM"
    target = ["encoder"] if two_sided else None
    model = wrap(backbone(kind, attn, head=False), shift_positions=shift, target_attention=target)
    set_table(model, encoder_table(encoder, p))
    output = model(input_ids=x, **({"decoder_input_ids": x} if two_sided else {}))
    assert_equal(output.encoder_last_hidden_state if two_sided else output.last_hidden_state, expected)
    assert_differ(expected, encoder(x)[0])


@both_attentions
@pytest.mark.parametrize("kind", ["t5", "bart"])
@torch.no_grad()
def test_three_prefixes_in_one_table(kind: str, attn: str):
    """Encoder, decoder and cross-attention each have their own tokens in front."""
    base = backbone(kind, attn)
    encoder = base.get_encoder()
    p_encoder, p_decoder, p_cross = (tiny.ids(1, N, seed=seed) for seed in (3, 6, 11))
    x, y = tiny.ids(1, 7), tiny.ids(1, 6, seed=4)
    states = torch.cat([encoder(p_cross)[0], encode_behind(encoder, p_encoder, x)], dim=1)
    output = base(
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        decoder_input_ids=torch.cat([p_decoder, y], dim=1),
        use_cache=True,
    )
    cache = output.past_key_values
    tables = [table_of(side)[:N] for side in (cache.self_attention_cache, cache.cross_attention_cache)]

    model = wrapped(kind, attn, shift_positions=True)
    set_table(model, torch.cat([encoder_table(encoder, p_encoder), *tables], dim=1))
    expected = output.logits[:, N:]
    assert_equal(model(input_ids=x, decoder_input_ids=y).logits, expected)
    assert_differ(expected, base(input_ids=x, decoder_input_ids=y).logits)


# ---- Properties of every prefix


@both_attentions
@both_shifts
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama"])
@torch.no_grad()
def test_padding_changes_nothing(kind: str, side: str, shift: bool, attn: str):
    model = wrap(backbone(kind, attn, head=False), shift_positions=shift)
    inputs = padded(kind, side, (7, 3, 5))
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    if side == "left" and kind != "roberta":  # this head finds the padding in the token ids
        inputs["position_ids"] = (real.cumsum(1) - 1).clamp(min=0)
    hidden = model(**inputs).last_hidden_state
    base = backbone(kind, head=False)
    for row in range(len(ids)):
        alone = ids[row, real[row]][None]
        expected = model(input_ids=alone).last_hidden_state[0]
        assert_equal(hidden[row, real[row]], expected)
        assert_differ(expected, base(alone).last_hidden_state[0])


@both_shifts
@pytest.mark.parametrize("side", [None, "right"], ids=["no mask", "mask"])
@pytest.mark.parametrize("kind", TASKS)
@torch.no_grad()
def test_eager_equals_sdpa(kind: str, side: str | None, shift: bool):
    inputs = batch(kind, side)
    eager, sdpa = (wrapped(kind, attn, shift_positions=shift)(**inputs).logits for attn in ("eager", "sdpa"))
    assert_equal(eager, sdpa)
    assert_differ(eager, backbone(kind)(**inputs).logits)


@pytest.mark.parametrize(
    "weights, autocast",
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, None),
        (torch.float16, torch.float16),
    ],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
@pytest.mark.parametrize("projection", [False, True], ids=["table", "mlp"])
@pytest.mark.parametrize("kind", TASKS)
def test_half_precision(kind: str, projection: bool, weights: torch.dtype, autocast: torch.dtype | None):
    """Half-precision weights or autocast, with the float32 prefix that PEFT makes of a trainable adapter."""
    inputs = batch(kind, "right")

    def run(model: nn.Module, autocast: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            logits = model(**inputs).logits.float()
        nn.functional.cross_entropy(logits.flatten(0, -2), torch.arange(logits[..., 0].numel()) % 3).backward()
        return logits.detach(), torch.cat([g.flatten() for g in prefix_gradients(model).values()])

    full = wrapped(kind, prefix_projection=projection)
    half = wrap(backbone(kind).to(weights), TASKS[kind], prefix_projection=projection)
    expected, expected_gradient = run(full)
    logits, gradient = run(half, autocast)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in prefix_of(half).parameters())
    assert logits.isfinite().all() and gradient.isfinite().all()
    without = backbone(kind)(**inputs).logits.detach()
    # The error is much smaller than the effect of the prefix.
    assert (logits - expected).norm() < 0.2 * (without - expected).norm()
    assert (gradient - expected_gradient).norm() < 0.2 * expected_gradient.norm()


@both_shifts
@pytest.mark.parametrize("kind", TASKS)
@torch.no_grad()
def test_disabled_is_the_backbone_bit_for_bit(kind: str, shift: bool):
    model, base = wrapped(kind, shift_positions=shift), backbone(kind)
    inputs = batch(kind, "right")
    before = model(**inputs).logits
    with model.disable_adapter():
        disabled = model(**inputs).logits
    expected = base(**inputs).logits
    assert torch.equal(disabled, expected)
    assert_differ(before, expected)
    assert torch.equal(model(**inputs).logits, before)


# ---- Generation

NEW = 10  # tokens


@pytest.fixture(params=["gpt2", "llama", "stories260k"])
def causal(request) -> tuple[Callable[[], nn.Module], list[Tensor]]:
    """A function that makes a causal model without an end token, and two prompts `[1, tokens]`."""
    if request.param != "stories260k":
        prompts = [tiny.ids(1, 6, seed=7), tiny.ids(1, 3, seed=8)]
        return lambda: backbone(request.param, eos_token_id=None), prompts
    folder = request.getfixturevalue("shared") / "models" / "stories260k"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [
        tokenizer(text, return_tensors="pt").input_ids for text in ("Once upon a time, a little girl", "Tom had a dog")
    ]
    assert prompts[0].shape != prompts[1].shape

    def load() -> nn.Module:
        model = LlamaForCausalLM.from_pretrained(folder).eval()
        model.generation_config.eos_token_id = None
        return model

    return load, prompts


def greedy(model: nn.Module, ids: Tensor, mask: Tensor | None = None, **kwargs) -> Tensor:
    """The new tokens, without the prompt."""
    mask = torch.ones_like(ids) if mask is None else mask
    output = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, pad_token_id=0, **kwargs
    )
    assert output.shape[1] == ids.shape[1] + NEW
    return output[:, ids.shape[1] :]


@both_shifts
@torch.no_grad()
def test_generate(causal, shift: bool):
    make, prompts = causal
    model, base = wrap(make(), "CAUSAL_LM", shift_positions=shift), make()
    alone = []
    for prompt in prompts:
        tokens = prompt
        for _ in range(NEW):
            tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        alone.append(tokens[:, prompt.shape[1] :])
        for use_cache in (True, False):
            assert torch.equal(greedy(model, prompt, use_cache=use_cache), alone[-1])
        assert not torch.equal(greedy(base, prompt), alone[-1])  # the prefix changes the text

    longest = max(prompt.shape[1] for prompt in prompts)
    ids = torch.cat([nn.functional.pad(prompt, (longest - prompt.shape[1], 0)) for prompt in prompts])
    mask = torch.cat([nn.functional.pad(torch.ones_like(p), (longest - p.shape[1], 0)) for p in prompts])
    for use_cache in (True, False):
        assert torch.equal(greedy(model, ids, mask, use_cache=use_cache), torch.cat(alone))


# ---- Training

DROPOUTS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
    *("dropout_rate", "dropout", "attention_dropout", "activation_dropout", "classifier_dropout"),
)


def no_dropout(kind: str) -> dict[str, float]:
    return {name: 0.0 for name in DROPOUTS if getattr(tiny.config(kind), name, None) is not None}


@pytest.mark.parametrize("use_reentrant", [None, False, True], ids=["plain", "checkpoint", "reentrant"])
@pytest.mark.parametrize("projection", [False, True], ids=["table", "mlp"])
@pytest.mark.parametrize("kind", TASKS)
def test_two_forwards_one_backward(kind: str, projection: bool, use_reentrant: bool | None):
    """Checkpointing repeats the first forward after the second one has run."""
    small = {"input_ids": tiny.ids(1, 4, seed=9)}
    if TASKS[kind] == "SEQ_2_SEQ_LM":
        small["decoder_input_ids"] = tiny.ids(1, 3, seed=10)
    batches = [batch(kind, "right"), small]

    def loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        logits = model(**inputs).logits
        return nn.functional.cross_entropy(logits.flatten(0, -2), torch.arange(logits[..., 0].numel()) % 3)

    expected = wrapped(kind, changes=no_dropout(kind), prefix_projection=projection)
    for inputs in batches:
        loss(expected, inputs).backward()

    model = wrapped(kind, changes=no_dropout(kind), prefix_projection=projection)
    if use_reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.train()
    calls: list[None] = []
    for module in model.modules():
        if type(module).__name__.endswith("Norm"):  # every layer has a gradient
            module.register_forward_hook(lambda *_: calls.append(None))
    losses = [loss(model, inputs) for inputs in batches]
    forward_calls = len(calls)
    sum(losses).backward()
    assert (len(calls) > forward_calls) == (use_reentrant is not None)  # layers were computed again
    gradients = prefix_gradients(model)
    for name, gradient in prefix_gradients(expected).items():
        assert_equal(gradients[name], gradient)


# ---- Positions


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "bart"])
@torch.no_grad()
def test_input_length(kind: str):
    """By default all positions of the backbone can be used. With a shift, longer inputs are an error."""

    def inputs(length: int) -> dict[str, Tensor]:
        ids = tiny.ids(1, length)
        return {"input_ids": ids, **({"decoder_input_ids": ids} if kind == "bart" else {})}

    kept, shifted = wrapped(kind), wrapped(kind, shift_positions=True)
    base = backbone(kind)
    for model, limit in ((kept, tiny.LENGTH), (shifted, tiny.LENGTH - N)):
        longest = inputs(limit)
        logits = model(**longest).logits
        assert logits.isfinite().all()
        assert_differ(logits, base(**longest).logits)
    for model, length in ((shifted, tiny.LENGTH), (kept, tiny.LENGTH + 1), (shifted, tiny.LENGTH + 1)):
        said = f"has {length} tokens.* has {tiny.LENGTH} positions"
        said += ".*shift_positions.*" if model is shifted else ".*"
        said += f"to {tiny.LENGTH - N if model is shifted else tiny.LENGTH} tokens"
        with pytest.raises(ValueError, match=said):
            model(**inputs(length))
    # The model can be used after the error.
    assert torch.equal(shifted(**inputs(9)).logits, wrapped(kind, shift_positions=True)(**inputs(9)).logits)
