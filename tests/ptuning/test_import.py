"""Checkpoints of THUDM/P-tuning, made here by torch modules with the names and sizes of its two parts."""

import argparse
import datetime

import pytest
import tiny
import torch
from peft import PeftModel
from torch import nn

from prefix_adapter import import_ptuning

N, SIZE, V = 5, tiny.HIDDEN, tiny.VOCAB


class Encoder(nn.Module):
    """The prompt encoder of the reference implementation; `width` is the size of each direction of its LSTM."""

    def __init__(self, width: int | None):
        super().__init__()
        torch.manual_seed(3)
        self.embedding, self.width = nn.Embedding(N, SIZE), width
        if width:
            self.lstm_head = nn.LSTM(SIZE, width, num_layers=2, bidirectional=True, batch_first=True)
        inner = 2 * width if width else SIZE
        self.mlp_head = nn.Sequential(nn.Linear(inner, SIZE), nn.ReLU(), nn.Linear(SIZE, SIZE))

    def forward(self):
        states = self.embedding.weight.unsqueeze(0)
        return self.mlp_head(self.lstm_head(states)[0] if self.width else states)[0]


def save(path, kind: str) -> Encoder:
    if kind == "LAMA":
        encoder = Encoder(SIZE // 2)
        options = argparse.Namespace(template=(2, 3, 0), lr=1e-5, device=torch.device("cpu"), no_cuda=False)
        content = {"embedding": encoder.state_dict(), "dev_hit@1": 0.4, "test_size": 8, "args": options}
        content |= {"ckpt_name": path.name, "time": datetime.datetime(2021, 3, 18, 12, 0)}
    else:
        encoder = Encoder(SIZE if kind == "SuperGLUE LSTM" else None)
        content = {"prompt_embeddings": encoder.embedding.state_dict()}
        if encoder.width:
            content |= {"lstm_head": encoder.lstm_head.state_dict(), "mlp_head": encoder.mlp_head.state_dict()}
        else:
            content["mlp"] = encoder.mlp_head.state_dict()
    torch.save(content, path)
    return encoder


@pytest.mark.parametrize("kind", ["LAMA", "SuperGLUE LSTM", "SuperGLUE MLP"])
def test_a_checkpoint(kind, tmp_path):
    encoder = save(tmp_path / "run.ckpt", kind)
    assert import_ptuning(tmp_path / "run.ckpt", tmp_path / "a", "bert-base-cased", 500) == tmp_path / "a"
    model = PeftModel.from_pretrained(tiny.model("bert", "AutoModelForMaskedLM"), tmp_path / "a").eval()
    config = model.active_peft_config
    assert (config.num_virtual_tokens, config.base_model_name_or_path) == (N, "bert-base-cased")
    ids = tiny.ids(2, 9)
    ids[0, [0, 2, 3, 6, 7]], ids[1, 4:] = 500, 500
    embedded = model.get_base_model().get_input_embeddings()(ids)
    with torch.no_grad():
        torch.testing.assert_close(embedded[0, [0, 2, 3, 6, 7]], encoder())
        torch.testing.assert_close(embedded[1, 4:], encoder())
        model(input_ids=ids)
    import_ptuning(tmp_path / "run.ckpt", tmp_path / "b")
    model = PeftModel.from_pretrained(tiny.model("bert", "AutoModelForMaskedLM"), tmp_path / "b")
    assert model.base_model.get_placeholder_ids() == list(range(V, V + N))


class Harmful:
    def __reduce__(self):
        return print, ("this code must not run",)


def test_what_is_no_checkpoint(tmp_path, capsys):
    path, encoder = tmp_path / "run.ckpt", Encoder(SIZE // 2).state_dict()
    short = {**encoder, "mlp_head.2.bias": torch.zeros(SIZE - 1)}
    cases = {
        "it has no prompt encoder": {"embedding": {}},
        "no dictionary of state dicts": [encoder],
        "lacks output.bias": {"embedding": {k: v for k, v in encoder.items() if k != "mlp_head.2.bias"}},
        r"has the shape \[31\] where \[32\]": {"embedding": short},
        "not finite": {"embedding": {**encoder, "mlp_head.0.bias": torch.full((SIZE,), torch.nan)}},
        "no part of P-tuning": {"embedding": {**encoder, "other.weight": torch.zeros(2)}},
        "print, which is no part of a tensor": {"embedding": encoder, "args": Harmful()},
        "no part of a dense tensor": {"embedding": encoder, "args": torch.zeros(2).to_sparse()},
    }
    for message, content in cases.items():
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            import_ptuning(path, tmp_path / "a")
    for unknown in ({"embedding": {**encoder, "other.weight": torch.zeros(2)}}, {"prompt": encoder}, encoder):
        torch.save(unknown, path)
        with pytest.raises(ValueError, match=r"A LAMA run .* A SuperGLUE run has `prompt_embeddings`"):
            import_ptuning(path, tmp_path / "a")
    with pytest.raises(ValueError, match="There is no file"):
        import_ptuning(tmp_path / "missing.ckpt", tmp_path / "a")
    assert not (tmp_path / "a").exists() and "must not run" not in capsys.readouterr().out
