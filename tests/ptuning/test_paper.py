"""The numbers of P-Tuning: against the paper in plain tensor maths, and against PEFT's P_TUNING and PROMPT_TUNING."""

import pytest
import tiny
import torch
from peft import PromptEncoderConfig, PromptTuningConfig
from torch import Tensor

from prefix_adapter import PTuningConfig, get_peft_model

N, V, SIZE = 5, tiny.VOCAB, tiny.HIDDEN
ROOT = "base_model.model.ptuning.ptuning_"
MODELS = {
    "bert": "AutoModelForMaskedLM",
    "roberta": "AutoModelForMaskedLM",
    "distilbert": "AutoModelForMaskedLM",
    "gpt2": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "t5": "AutoModelForSeq2SeqLM",
    "bart": "AutoModelForSeq2SeqLM",
}
CHANGES = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "llama": {},
    "t5": {"initializer_factor": 1.0},  # T5 does not scale its scores: larger weights saturate the softmax
}


def lstm_cell(weights: dict[str, Tensor], end: str, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One step of an LSTM (Hochreiter and Schmidhuber 1997, with a forget gate)."""
    gates = weights[f"weight_ih_{end}"] @ x + weights[f"bias_ih_{end}"]
    gates = gates + weights[f"weight_hh_{end}"] @ h + weights[f"bias_hh_{end}"]
    inlet, forget, cell, outlet = gates.chunk(4)
    c = forget.sigmoid() * c + inlet.sigmoid() * cell.tanh()
    return outlet.sigmoid() * c.tanh(), c


def virtual_tokens(weights: dict[str, Tensor], kind: str | None) -> Tensor:
    """The virtual tokens `[n, size]` (section 3.2 of the paper): h_i = MLP([forward LSTM_i : backward LSTM_i])."""
    rows = list(weights["embedding.weight"])
    lstm = {name.removeprefix("lstm."): value for name, value in weights.items() if name.startswith("lstm.")}
    for layer in (0, 1) if kind == "LSTM" else ():
        sides = []
        for end, order in (("", range(len(rows))), ("_reverse", reversed(range(len(rows))))):
            width = lstm[f"weight_hh_l{layer}{end}"].shape[1]
            h, c = torch.zeros(width), torch.zeros(width)
            side = {}
            for index in order:
                h, c = lstm_cell(lstm, f"l{layer}{end}", rows[index], h, c)
                side[index] = h
            sides.append(side)
        rows = [torch.cat([side[index] for side in sides]) for index in range(len(rows))]
    if kind is None:
        return torch.stack(rows)
    hidden = [torch.relu(weights["hidden.weight"] @ row + weights["hidden.bias"]) for row in rows]
    return torch.stack([weights["output.weight"] @ row + weights["output.bias"] for row in hidden])


def weights_of(model) -> dict[str, Tensor]:
    """Copies of the adapter's parameters, as leaves with a gradient."""
    own = {name: value for name, value in model.named_parameters() if name.startswith(ROOT)}
    short = {name.removeprefix(ROOT).replace(".default", ""): value for name, value in own.items()}
    return {name: value.detach().clone().requires_grad_() for name, value in short.items()}


def wrap(kind: str, encoder: str | None = "LSTM", changes=None, **settings):
    base = tiny.model(kind, MODELS[kind], **(changes or {}))
    config = PTuningConfig(num_virtual_tokens=N, encoder_reparameterization_type=encoder, **settings)
    model = get_peft_model(base, config).eval()
    tiny.randomize(model.base_model.layer)
    return model


def batch(kind: str) -> tuple[dict[str, Tensor], list[tuple[int, int, int]]]:
    """Inputs of two rows, the first one padded on the left, and the places of virtual tokens: row, place, which."""
    ids = tiny.ids(2, 9)
    places = [(0, 3, 0), (0, 5, 1), (0, 6, 4), (1, 0, 3), (1, 4, 3), (1, 8, 2)]
    for row, place, which in places:
        ids[row, place] = V + which
    mask = torch.ones_like(ids)
    ids[0, :2], mask[0, :2] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if kind in ("t5", "bart"):
        inputs["decoder_input_ids"] = tiny.ids(2, 4, seed=3)
    return inputs, places


def by_embeddings(model, kind: str, vectors: Tensor, inputs: dict[str, Tensor], places, labels=None) -> Tensor:
    """What the base model computes when it is given embeddings in which the virtual tokens stand."""
    base = model.get_base_model()
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    with model.disable_adapter():
        table = base.get_encoder().get_input_embeddings() if kind in ("t5", "bart") else base.get_input_embeddings()
        rows = [list(row) for row in table(inputs["input_ids"].clamp(max=V - 1)).detach()]
        for row, place, which in places:
            rows[row][place] = vectors[which]
        embedded = torch.stack([torch.stack(row) for row in rows])
        if kind == "roberta":  # its positions come from the token ids, or count all tokens if there are none
            real = (inputs["input_ids"] != base.config.pad_token_id).long()
            rest["position_ids"] = real.cumsum(1) * real + base.config.pad_token_id
        return base(inputs_embeds=embedded, labels=labels, **rest)


@pytest.mark.parametrize("encoder", ["LSTM", "MLP", None])
@pytest.mark.parametrize("kind", MODELS)
def test_outputs_and_gradients(kind, encoder):
    model, (inputs, places) = wrap(kind, encoder, CHANGES.get(kind)), batch(kind)
    weights = weights_of(model)
    output = model(**inputs).logits
    expected = by_embeddings(model, kind, virtual_tokens(weights, encoder), inputs, places).logits
    with torch.no_grad(), model.disable_adapter():
        words = {**inputs, "input_ids": inputs["input_ids"].clamp(max=V - 1)}
        assert (output - model(**words).logits).abs().max() > 1e-2
    torch.testing.assert_close(output, expected, atol=2e-5, rtol=1e-5)

    torch.manual_seed(0)
    goal = torch.randn(output.shape)
    (output * goal).sum().backward()
    (expected * goal).sum().backward()
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.removeprefix(ROOT).replace(".default", "") for name in own} == set(weights)
    for name, parameter in own.items():
        gradient = weights[name.removeprefix(ROOT).replace(".default", "")].grad
        scale = gradient.abs().max().item()
        torch.testing.assert_close(parameter.grad, gradient, atol=2e-4 * scale, rtol=1e-3, msg=name)


@pytest.mark.parametrize("encoder", ["LSTM", "MLP", None])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_three_steps_of_adam(kind, encoder):
    model, (inputs, places) = wrap(kind, encoder, CHANGES[kind]), batch(kind)
    weights = weights_of(model)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, 7], labels[1, 6] = 11, 12
    ours = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in weights.items()}
    for step in range(1, 4):
        loss = model.train()(**inputs, labels=labels).loss
        ours.zero_grad()
        loss.backward()
        ours.step()
        theirs = by_embeddings(model, kind, virtual_tokens(weights, encoder), inputs, places, labels).loss
        torch.testing.assert_close(loss, theirs, atol=1e-4, rtol=1e-4)
        gradients = torch.autograd.grad(theirs, list(weights.values()))
        for (name, value), gradient in zip(weights.items(), gradients, strict=True):
            first, second = moments[name]
            first.mul_(0.9).add_(gradient, alpha=0.1)
            second.mul_(0.999).add_(gradient**2, alpha=0.001)
            with torch.no_grad():
                value -= 1e-2 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
    for name, value in weights.items():
        part, _, key = name.partition(".")
        own = model.get_parameter(f"{ROOT}{part}.default.{key}")
        # The sign of a gradient that is nearly zero decides over a whole step of Adam.
        assert ((own - value).abs() > 1e-4).float().mean() < 0.01, name


def test_the_sizes_of_the_encoder():
    """Half the hidden size for each direction: what the bidirectional LSTM returns is as large as an embedding."""
    shapes = {name: tuple(value.shape) for name, value in weights_of(wrap("bert")).items()}
    lstm = {
        f"lstm.{name}_l{layer}{end}": shape
        for layer in (0, 1)
        for end in ("", "_reverse")
        for name, shape in {
            "weight_ih": (2 * SIZE, SIZE),
            "weight_hh": (2 * SIZE, SIZE // 2),
            "bias_ih": (2 * SIZE,),
            "bias_hh": (2 * SIZE,),
        }.items()
    }
    keys = {"weight": (SIZE, SIZE), "bias": (SIZE,)}
    linear = {f"{name}.{key}": shape for name in ("hidden", "output") for key, shape in keys.items()}
    assert shapes == {"embedding.weight": (N, SIZE), **lstm, **linear}


def copy_from_peft(theirs, ours) -> None:
    prompt = theirs.prompt_encoder["default"]
    names = {"lstm_head": "lstm", "mlp_head.0": "hidden", "mlp_head.2": "output"}
    with torch.no_grad():
        for name, value in prompt.state_dict().items():
            part, _, key = name.rpartition(".")
            ours.get_parameter(f"{ROOT}{names.get(part, part)}.default.{key}").copy_(value)


@pytest.mark.parametrize("encoder", ["LSTM", None])
@pytest.mark.parametrize(
    ("kind", "auto", "task"),
    [
        ("bert", "SequenceClassification", "SEQ_CLS"),
        ("llama", "CausalLM", "CAUSAL_LM"),
        ("gpt2", "CausalLM", "CAUSAL_LM"),
    ],
)
def test_peft_with_virtual_tokens_at_the_front(kind, auto, task, encoder):
    """PEFT's P_TUNING and PROMPT_TUNING put virtual tokens in front of the input: so do placeholders at the front."""
    common = {"task_type": task, "num_virtual_tokens": N}
    width = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": SIZE // 2}
    peft_config = PromptEncoderConfig(**common, **width) if encoder else PromptTuningConfig(**common)
    config = PTuningConfig(**common, encoder_reparameterization_type=encoder)
    bases = [tiny.model(kind, f"AutoModelFor{auto}") for _ in range(2)]
    compare_with_peft(get_peft_model(bases[0], peft_config).eval(), get_peft_model(bases[1], config).eval())


def compare_with_peft(theirs, ours) -> None:
    copy_from_peft(theirs, ours)
    ids = tiny.ids(2, 6)
    front = torch.arange(V, V + N).expand(2, -1)
    expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    own = ours(input_ids=torch.cat([front, ids], 1), attention_mask=torch.ones(2, N + 6, dtype=torch.long)).logits
    own = own if own.dim() == 2 else own[:, -expected.shape[1] :]
    torch.testing.assert_close(own, expected, atol=2e-5, rtol=1e-5)
    expected.square().sum().backward()
    own.square().sum().backward()
    names = {"lstm_head": "lstm", "mlp_head.0": "hidden", "mlp_head.2": "output"}
    for name, value in theirs.prompt_encoder["default"].named_parameters():
        part, _, key = name.rpartition(".")
        gradient = ours.get_parameter(f"{ROOT}{names.get(part, part)}.default.{key}").grad
        scale = max(value.grad.abs().max().item(), 1e-6)
        torch.testing.assert_close(gradient, value.grad, atol=1e-4 * scale, rtol=1e-3)


def test_random_starts():
    """A table starts with the spread of the words; the embedding of an encoder as in the reference implementation."""

    def start(**settings) -> float:
        model = get_peft_model(tiny.model("bert"), PTuningConfig(num_virtual_tokens=200, **settings))
        return weights_of(model)["embedding.weight"].std().item()

    words = tiny.model("bert").get_input_embeddings().weight
    assert start(encoder_reparameterization_type=None) == pytest.approx(words.std().item(), rel=0.05)
    assert start() == pytest.approx(1.0, rel=0.05)
    assert start(init_std=0.3) == pytest.approx(0.3, rel=0.05)
    assert start(init_std=0.3, encoder_reparameterization_type=None) == pytest.approx(0.3, rel=0.05)


def test_a_start_from_words_in_some_places():
    words = tiny.model("bert").get_input_embeddings().weight
    settings = {"encoder_reparameterization_type": None, "init_token_ids": [None, 7, None, 9]}
    config = PTuningConfig(num_virtual_tokens=4, **settings)
    weight = weights_of(get_peft_model(tiny.model("bert"), config))["embedding.weight"]
    assert torch.equal(weight[[1, 3]], words[[7, 9]])
    assert all((weight[row] != words).any(-1).all() for row in (0, 2)) and not torch.equal(weight[0], weight[2])


@pytest.mark.parametrize("kind", ["bert", "bart", "gemma3"])
def test_a_start_from_words(kind):
    """The model with virtual tokens that start from words computes the same as with the words."""
    base = gemma3() if kind == "gemma3" else tiny.model(kind, MODELS[kind])
    words = [7, 8, 9]
    config = PTuningConfig(num_virtual_tokens=N, encoder_reparameterization_type=None, init_token_ids=words)
    ids, inputs = tiny.ids(2, 9), {}
    if kind == "bart":
        inputs["decoder_input_ids"] = tiny.ids(2, 4, seed=3)
    real = ids.clone()
    real[:, [2, 3, 5, 8]] = torch.tensor([7, 8, 9, 7])
    ids[:, [2, 3, 5, 8]] = torch.tensor([V, V + 1, V + 2, V + 3])
    expected = base(input_ids=real, **inputs).logits
    assert torch.equal(get_peft_model(base, config).eval()(input_ids=ids, **inputs).logits, expected)


def gemma3():
    """A tiny Gemma 3, whose embedding module multiplies its output."""
    import transformers as tr

    torch.manual_seed(0)
    config = tr.Gemma3TextConfig(
        vocab_size=V, hidden_size=SIZE, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=16, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    return tr.AutoModelForCausalLM.from_config(config).eval()
