"""Layers that are computed again in the backward pass: everything is what it is without, and less is kept. How much less, how often a layer
is computed and what that costs are counted by hand."""

from __future__ import annotations

import json
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from fedloom.compute.division import Part, pass_bytes
from fedloom.compute.flops import Flops
from fedloom.compute.serial import Serial
from fedloom.compute.stacked import Stacked
from fedloom.compute.work import AdamW, Fisher, Fit, Predict, Score, Sensitivity, Spectrum, WorkItem
from fedloom.data.examples import Examples
from fedloom.methods.embracingfl import EmbracingFL
from fedloom.methods.fedcybgd import FedCyBGD
from fedloom.model.adapters import Adapter, Kind
from fedloom.model.base import Model
from fedloom.model.blocks import layer_of
from fedloom.model.loading import load
from fedloom.model.memory import needs
from fedloom.model.modes import Mode, as_now, entered
from fedloom.model.names import is_head
from fedloom.model.places import ModelError
from fedloom.model.recomputed import Recomputed
from fedloom.model.texts import Batch
from fedloom.model.writing import continued
from fedloom.run.costs.memory import insist_on_room, sizes_of
from fedloom.run.describe import describe
from fedloom.run.errors import ExperimentError
from fedloom.run.experiment import EngineSettings, Experiment
from fedloom.run.loop import run
from tests import families, small, tiny

BATCHES = [np.array([0, 3, 4]), np.array([1, 2])]
OPTIMIZER = AdamW(1e-2)


@cache
def model(family: str, kind: Kind, dropout: float = 0.2) -> Model:
    """The family's tiny model; whole models drop out as well."""
    adapter = Adapter(rank=2, targets=families.TARGETS.get(family, ()) if kind == "lora" else (), dropout=dropout, kind=kind)
    return load(str(families.folder(family)), num_labels=3, adapter=adapter, seed=1, max_length=16)


@cache
def llama(layers: int) -> Model:
    """A whole Llama of so many layers."""
    path = Path(mkdtemp(prefix="llama-"))
    torch.manual_seed(3)
    config = AutoConfig.for_model("llama", **{**families.LLAMA, "num_hidden_layers": layers})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return load(str(path), num_labels=3, adapter=Adapter(kind="full"), seed=1, max_length=16)


@contextmanager
def again(of: Model) -> Iterator[Model]:
    """Inside, the model's layers are computed again."""
    ways, of._ways, of.recomputes = of._ways, {}, True
    try:
        yield of
    finally:
        of._ways, of.recomputes = ways, False


def texts(count: int = 5, seed: int = 0) -> Examples:
    return tiny.examples(count, seed=seed)


def blockwise(of: Model, layer: int, **more: Any) -> Fit:
    """One layer and the head are trained; the rest came from a server and is not the model's own."""
    moved = families.moved(of)
    start = {n: t for n, t in moved.items() if layer_of(n) == layer or is_head(n)}
    rest = {n: t for n, t in moved.items() if n not in start}
    return Fit(start, texts(), BATCHES, OPTIMIZER, fixed=rest, dropout_seed=9, **more)


def equal(one: Any, other: Any) -> bool:
    """To the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(equal(one[n], other[n]) for n in one)
    return bool(np.array_equal(one, other))


def parts(result: Any) -> Any:
    """What of a result is compared."""
    return {**result.tensors, "losses": torch.tensor(result.losses)} if hasattr(result, "losses") else result


def results(compute: type[Serial] | type[Stacked], of: Model, items: list[WorkItem]) -> list[Any]:
    """Of the plain compute without what they cost, which takes longer to count than to compute."""
    if compute is Serial:
        return [parts(Serial(of)._result(item)) for item in items]
    return [parts(done.result) for done in compute(of).run(items)]


def insist_equal(compute: type[Serial] | type[Stacked], of: Model, items: list[WorkItem]) -> None:
    """To the bit; of a decoder without the cache that it fills otherwise, which lays keys out anew, so that their products may have other
    last bits."""
    caching, of.config.use_cache = of.config.to_dict().get("use_cache", False), False
    plain = results(compute, of, items)
    of.config.use_cache = caching
    with again(of):
        recomputed = results(compute, of, items)
    for item, one, other in zip(items, plain, recomputed, strict=True):
        assert equal(one, other), type(item).__name__


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("family", families.APART)
def test_what_is_trained_is_the_same_to_the_bit(family: str, kind: Kind) -> None:
    """Tensors that are not the module's own, dropout on; everything is trained, the last layer, the first one."""
    of = model(family, kind)
    whole = Fit(families.moved(of), texts(), BATCHES, OPTIMIZER, dropout_seed=3)
    insist_equal(Serial, of, [whole, blockwise(of, 1), blockwise(of, 0)])


def test_a_decoder_whose_cache_is_off_meanwhile_differs_by_rounding_at_the_most() -> None:
    of = model("gpt2", "lora")
    assert of.config.use_cache
    item = Fit(families.moved(of), texts(), BATCHES, OPTIMIZER, dropout_seed=3)
    (plain,) = Serial(of).run([item])
    with again(of):
        (done,) = Serial(of).run([item])
    assert max(float((done.result.tensors[n] - t).abs().max()) for n, t in plain.result.tensors.items()) < 1e-5


@pytest.mark.parametrize("family", ["bert", "deberta-v2", "modernbert", "gpt2", "llama"])
def test_many_devices_at_once_too(family: str) -> None:
    """Packed, or padded side by side: owners' tensors, dropout by owner, gradients of single examples, sensitivity."""
    of = model(family, "lora")
    at = [families.moved(of, k) for k in range(3)]
    items: list[WorkItem] = [Fit(t, texts(seed=k), BATCHES[: 1 + k % 2], OPTIMIZER, dropout_seed=k) for k, t in enumerate(at)]
    items += [make(t, texts(3, k)) for make in (Score, Fisher, Predict) for k, t in enumerate(at)]
    items += [Sensitivity(t, texts(seed=k), BATCHES[0]) for k, t in enumerate(at)]
    assert not of.alone
    insist_equal(Stacked, of, items)
    insist_equal(Serial, of, items[2:])


def test_some_rows_layers_left_out_and_second_derivatives_too() -> None:
    of = model("bert", "lora")
    moved = families.moved(of)
    name = next(n for n in moved if ".lora_B." in n and ".0." in n)
    few = Fit({**moved, name: moved[name][[1, 4, 9]]}, texts(), BATCHES, OPTIMIZER, rows={name: torch.tensor([1, 4, 9])}, dropout_seed=3)
    gone = {n: t for n, t in moved.items() if layer_of(n) != 0}
    skipped = Fit(gone, texts(), BATCHES, OPTIMIZER, skips=frozenset({0}))
    for compute in (Serial, Stacked):
        insist_equal(compute, of, [few, replace(few, dropout_seed=4), skipped])
    spectrum = Spectrum(moved, texts(), BATCHES[0], frozenset({name}))
    (plain,) = Serial(of).run([spectrum])
    with again(of):
        (done,) = Serial(of).run([spectrum])
    assert equal(plain.result.nodes, done.result.nodes) and done.flops == plain.flops, "its graph keeps all, so nothing is computed again"


def test_in_packed_passes_too_a_layer_is_computed_twice_but_for_a_trimmed_last_one() -> None:
    """With dropout, where attention is made of PyTorch's operations, and without. The last layer looks first, and then computes."""
    for dropout in (0.0, 0.2):
        of, seen = model("bert", "lora", dropout), Counter[int]()
        assert of.together_by == "packed"
        with again(of), ExitStack() as hooks:
            way: Any = of.way(torch.float32)
            for i, layer in enumerate(way.recomputed.stack):
                hook = layer.attention.self.value.register_forward_hook(lambda *_, i=i, seen=seen: seen.update([i]))
                hooks.callback(hook.remove)
            Stacked(of)._fit([Fit(families.moved(of, k), texts(seed=k), BATCHES[:1], OPTIMIZER) for k in range(2)])
        assert seen == {0: 2, 1: 2}


def test_the_backward_pass_may_run_in_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does on accelerators: there no mode is entered and no context is the caller's."""
    real = torch.autograd.grad

    def elsewhere(*given: Any, **how: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(real, *given, **how).result()

    of = model("bert", "lora")
    items: list[WorkItem] = [Fit(families.moved(of, k), texts(seed=k), BATCHES, OPTIMIZER, dropout_seed=k) for k in range(2)]
    due = {compute: [parts(done.result) for done in compute(of).run(items)] for compute in (Serial, Stacked)}
    monkeypatch.setattr(torch.autograd, "grad", elsewhere)
    with again(of):
        for compute, results in due.items():
            for one, done in zip(results, compute(of).run(items), strict=True):
                assert equal(one, parts(done.result))


@pytest.fixture
def computed() -> Iterator[Any]:
    """Call with a model: by (layer, part), how often the part is computed from then on."""
    with ExitStack() as hooks:

        def watching(of: Model) -> Counter[tuple[int, str]]:
            seen = Counter[tuple[int, str]]()
            for i, layer in enumerate(of.base(of.dtype).model.layers):  # type: ignore[union-attr,arg-type]
                for part in ("input_layernorm", "mlp.down_proj"):
                    hook = layer.get_submodule(part).register_forward_hook(lambda *_, at=(i, part): seen.update([at]))
                    hooks.callback(hook.remove)
            return seen

        yield watching


def test_a_layer_that_a_gradient_passes_is_computed_twice_and_no_other(computed: Any) -> None:
    """Block 2 of 0..3 and the head: 0 and 1 once, 2 and 3 twice, up to the last thing that is kept, which in a Llama's layer is what comes
    into its last product, or that product's frozen weight."""
    of = llama(4)
    with again(of):
        seen = computed(of)
        Serial(of)._fit(replace(blockwise(of, 2), batches=BATCHES[:1]))
        assert [seen[i, "input_layernorm"] for i in range(4)] == [1, 1, 2, 2]
        assert [seen[i, "mlp.down_proj"] for i in range(4)] == [1, 1, 1, 1]
        seen.clear()
        Serial(of)._predict(Predict(families.moved(of), texts()))
        assert set(seen.values()) == {1}, "nothing is computed twice where nothing is differentiated"
        seen.clear()
        Serial(of)._fit(replace(blockwise(of, 9), batches=BATCHES[:1]))
        assert set(seen.values()) == {1}, "nor below a head that is trained alone"


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that operations made and that are still there."""

    def __init__(self) -> None:
        self.now, self.most, self.seen = 0, 0, weakref.WeakSet[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.update(
            t.untyped_storage() for t in args if isinstance(t, torch.Tensor) and not t.is_mkldnn
        )  # what is given, and views of it
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage.nbytes())
        return made

    def _gone(self, count: int) -> None:
        self.now -= count


def batch(length: int = 12, count: int = 3) -> Batch:
    ids = torch.arange(count * length).remainder(60).view(count, length) + 4
    return Batch(ids, ids > 0, torch.zeros_like(ids), torch.arange(count) % 3, torch.ones(count))


def alive(of: Model, trained: Any) -> tuple[int, int]:
    """Bytes that a forward pass leaves for the backward pass; bytes at the most until that has ended."""
    now = {n: t.clone().requires_grad_(bool(trained(n))) for n, t in families.moved(of).items()}
    wanted = [t for t in now.values() if t.requires_grad]
    with Alive() as counted:
        loss = of.loss(now, batch(), torch.float32)
        kept = counted.now
        torch.autograd.grad(loss, wanted)
    return kept, counted.most


def test_a_layer_keeps_its_input_and_one_inside_is_there_at_a_time() -> None:
    """Of 3 texts of 12 tokens in 16 dimensions a layer's input is 2304 bytes. A layer more costs that, and no inside; at the most it costs
    that and its gradients."""
    state, everything = 3 * 12 * 16 * 4, lambda name: True
    plain = {depth: alive(llama(depth), everything) for depth in (2, 6)}
    fewer = {}
    for depth in (2, 6):
        with again(llama(depth)):
            fewer[depth] = alive(llama(depth), everything)
    inside = (plain[6][0] - plain[2][0]) / 4
    assert (fewer[6][0] - fewer[2][0]) / 4 == state and inside > 15 * state
    given = 3 * 12 * 12 * 4 + 3 * 12 * 8  # the mask and the positions, which all layers are called with
    assert plain[6][0] - fewer[6][0] == 6 * (inside - state) - given, "all that a layer kept is gone, and what it was called with is there"
    gradients = 4 * sum(t.numel() for n, t in llama(6).initial.items() if layer_of(n) == 0)
    assert fewer[6][1] - fewer[2][1] <= 4 * (state + gradients), "at the most, too: a layer more is its input and its gradients"
    assert fewer[6][1] < plain[6][1] - 4 * (inside - state)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_in_packed_passes_a_layer_keeps_its_input_too(dropout: float) -> None:
    """80 tokens and fewer are 96 rows of 16 numbers; masks of dropped attention weights are inside as well."""
    kept = {}
    for depth in (2, 4):
        of = tiny.model(layers=depth, dropout=dropout)
        compute, items = Stacked(of), [Fit(families.moved(of, k), texts(seed=k), BATCHES, OPTIMIZER) for k in range(2)]
        pieces, keys = [Part(k, np.arange(5)) for k in range(2)], [1, 2] if dropout else []
        for again_too in (False, True):
            of._ways, of.recomputes = {}, again_too
            given = compute._texts(items, pieces, [0, 1], [0.2, 0.2], keys)
            flat, matrix = compute._flat([item.start for item in items])
            tensors = flat.split(matrix.requires_grad_(True))
            of.together(tensors, given, torch.float32)  # weights are packed once
            with Alive() as counted:
                loss = given.losses(of.together(tensors, given, torch.float32)[0]).sum()
                kept[depth, again_too] = counted.now
            assert loss.requires_grad
    assert len(given.ids) == 79
    inside, fewer = ((kept[4, way] - kept[2, way]) / 2 for way in (False, True))
    assert fewer == 96 * 16 * 4 and inside > 10 * fewer


def test_nothing_is_kept_below_the_block() -> None:
    """Of the upper two layers of 6 as much is kept as of a model of 2, but for what is given once."""
    upper = {}
    for depth in (3, 6):
        with again(llama(depth)):
            upper[depth], _ = alive(llama(depth), lambda name, depth=depth: is_head(name) or layer_of(name) == depth - 2)
    assert upper[3] == upper[6]


def test_the_second_forward_pass_is_counted() -> None:
    """tiny's BERT: of each layer that a gradient passes all products once more. Trained is what lies in layer 1 of 0, 1, 2: two layers."""
    of, length = tiny.model(kind="full"), 11
    hidden, inner = 16, 32
    layer = 2 * length * (4 * hidden * hidden + 2 * hidden * inner + 2 * hidden * length)
    for names, passed in (({n for n in of.initial if layer_of(n) == 1}, 2), (set(of.initial), 3), (set(of.head), 0)):
        plain = Flops(of).step(frozenset(names), length)
        with again(of):
            recomputed = Flops(of)
        with again(of):
            assert float(recomputed.step(frozenset(names), length) - plain) == pytest.approx(passed * layer, rel=1e-9, abs=1)
            assert recomputed.forward(length) == pytest.approx(Flops(of).forward(length))
    item = blockwise(of, 1)
    (plain_done,) = Serial(of).run([item])
    with again(of):
        (done,) = Serial(of).run([item])
    rows = [(len(b), int(item.examples.lengths[b].max())) for b in BATCHES]
    extra = sum(n * 2 * 2 * at * (4 * hidden * hidden + 2 * hidden * inner + 2 * hidden * at) for n, at in rows)
    assert done.flops - plain_done.flops == pytest.approx(extra, rel=1e-6)


def test_the_forecast_knows_it() -> None:
    """B·L·(a + h·min(ℓ, D) + w), by hand for tiny's BERT: a layer's inside once, and its input once a layer."""
    of = tiny.model(kind="full")
    inside, state = 4 * (16 * 16 + 3 * 32 + 3 * 2 * of.max_length), 4 * 16
    with again(of):
        made = [one.activations for one in needs(of, 5, recomputed=True)]
        assert made == [5 * of.max_length * (inside + state * min(layers, 3)) for layers in range(5)]
        assert pass_bytes(of) == inside + 3 * state and pass_bytes(of, twice=True) == 3 * inside
        less, chosen = sizes_of(of, FedCyBGD()).per_token, EmbracingFL().init(of).facts
    assert chosen == EmbracingFL().init(of).facts, "what a method chooses by memory does not depend on how it is computed"
    assert less == inside + 3 * state and sizes_of(of, FedCyBGD()).per_token == 3 * inside == pass_bytes(of)
    large = replace(sizes_of(of, FedCyBGD()), model=10**9, trained=10**9)
    with pytest.raises(ExperimentError, match=r"--engine\.recompute \(less for passing a batch through"):
        insist_on_room(large, Experiment(FedCyBGD(), clients=4, cohort=2), free=10**9)
    with pytest.raises(ExperimentError) as told:
        insist_on_room(large, Experiment(FedCyBGD(), clients=4, cohort=2, engine=EngineSettings(recompute=True)), free=10**9)
    assert "--engine.recompute" not in str(told.value)


def test_a_run_is_the_same_run_and_costs_more(tmp_path: Path) -> None:
    """FedCyBGD's; and what describe tells of costs and memory is told of this run."""
    plain = small.experiment("fedcybgd", evaluate_every=0)
    also = replace(plain, engine=replace(plain.engine, recompute=True))
    assert plain.digest() == also.digest()
    found = []
    for where, e in (("plain", plain), ("also", also)):
        result = run(e, tmp_path / where, plain=True)
        rows = [json.loads(line) for line in (tmp_path / where / "rounds.jsonl").read_text().splitlines()]
        found.append((result, rows))
    (one, rows), (other, more) = found
    losses = [row["loss"] for row in rows[1:]]
    assert [row["loss"] for row in more[1:]] == pytest.approx(losses, rel=1e-6, abs=0.0), "without it the whole model runs under vmap"
    assert one["final"]["personalised"] == other["final"]["personalised"]
    assert all(
        0 < a["flops"] < b["flops"] < 1.5 * a["flops"] and a["device_seconds"] < b["device_seconds"]
        for a, b in zip(rows[1:], more[1:], strict=True)
    )
    lines = dict(describe(also).lines)
    assert lines["training takes"].endswith("; layers are computed again in backward passes")
    assert "passing a batch through, layers computed again" in lines["memory here"]
    assert f"{more[1]['flops']:.3g} FLOPs" in lines["first round"]


def test_where_it_cannot_be_done_it_is_said() -> None:
    """vmap keeps everything: a model that runs under it runs one device at a time. Without a list of layers nothing is to be had."""
    folder, how = str(families.folder("bert")), {"num_labels": 3, "adapter": Adapter(kind="full"), "max_length": 16}
    plain = load(folder, **how)
    assert plain.together_by == "vmap"
    made = load(folder, **how, recompute=True)
    assert "vmap: it keeps what is inside layers, which is to be computed again" in made.alone and made.recomputes
    items: list[WorkItem] = [blockwise(made, 1), blockwise(made, 0)]
    for one, other in zip(Serial(plain).run(items), Stacked(made).run(items), strict=True):
        assert equal(parts(one.result), parts(other.result)) and other.flops > one.flops
    with pytest.raises(LookupError, match="no list of 3 transformer layers in BertFor"):
        Recomputed(made.module, 3)
    made.config.num_hidden_layers, made._recomputed = 3, {}
    with pytest.raises(ModelError, match="can be computed again: no list of 3 .* leave --engine.recompute out"):
        made.loss(made.initial, batch(), torch.float32)
    made.config.num_hidden_layers = 2


def test_a_layer_that_is_another_the_second_time_is_an_error() -> None:
    """And not a wrong gradient."""
    of = llama(2)
    layer: Any = of.module.model.layers[0]
    for change, says in (("cut", "made .* at its second computation"), ("detach", "kept .* at its second computation")):
        count = [0]

        def hook(_: Any, __: Any, made: torch.Tensor, change: str = change, count: list[int] = count) -> torch.Tensor:
            count[0] += 1
            return made if count[0] == 1 else made.detach() if change == "detach" else made[:, 1:]

        hanging = layer.post_attention_layernorm.register_forward_hook(hook)
        try:
            with again(of), pytest.raises(RuntimeError, match=says):
                now = {n: t.clone().requires_grad_(layer_of(n) == 0 and "mlp" not in n) for n, t in of.initial.items()}
                torch.autograd.grad(of.loss(now, batch(), torch.float32), [t for t in now.values() if t.requires_grad])
        finally:
            hanging.remove()


def test_a_call_leaves_the_module_as_it_was_and_caches_off_only_meanwhile(tmp_path: Path) -> None:
    """Also one that fails. What writes answers keeps its cache."""
    config = AutoConfig.for_model("llama", **families.LLAMA)
    torch.manual_seed(4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(tmp_path)
    of = load(str(tmp_path), num_labels=2, adapter=Adapter(rank=2), answers="", max_length=24)
    layers: Any = Recomputed(of.module, 2).stack
    seen = []
    hook = layers[0].register_forward_hook(lambda *_, **__: seen.append(of.config.use_cache), with_kwargs=True)
    before = continued(of, of.initial, [[5, 6, 7]], 6)
    assert seen[-1] is True
    with again(of):
        given = batch()._replace(segments=torch.ones(3, 12, dtype=torch.int64))
        of.loss({n: t.clone().requires_grad_() for n, t in of.initial.items()}, given, torch.float32)
        assert seen[-1] is False
        assert "forward" not in vars(layers[0]) and of.config.use_cache is True
        with pytest.raises(RuntimeError):
            of.loss({n: t[:1] for n, t in of.initial.items()}, given, torch.float32)
        assert "forward" not in vars(layers[0]) and of.config.use_cache is True
        assert continued(of, of.initial, [[5, 6, 7]], 6) == before and seen[-1] is True
    hook.remove()


def test_modes_are_known_while_they_are_entered_and_copies_stay() -> None:
    class Counting(Mode):
        def __init__(self) -> None:
            self.site = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.site += 1
            return func(*args, **(kwargs or {}))

    outer, inner = Counting(), Counting()
    with outer, inner:
        torch.zeros(1)
        assert entered() == (outer, inner)
        kept = as_now()
        torch.zeros(1)
        assert [mode.site for mode in kept if isinstance(mode, Counting)] == [1, 1] and (outer.site, inner.site) == (2, 2)
    assert entered() == ()
