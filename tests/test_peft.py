"""PEFT's adapters: what is dropped by default, what a merge gives, and that quantized weights are refused."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import td_plugin as td
from td_plugin.export import shrink
from td_plugin.integrations.hf import TargetedDropoutCallback
from td_plugin.integrations.peft import merge

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT reads it

BASE = "base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.weight"
FACTOR = BASE.replace("base_layer", "lora_{}.default")
CONFIG = BertConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=32,
    max_position_embeddings=16,
)


def adapted() -> PeftModel:
    torch.manual_seed(0)
    lora = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
    model = get_peft_model(BertForSequenceClassification(CONFIG), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # PEFT starts it at zero: a merge would change nothing
            nn.init.normal_(parameter, std=0.3)
    return model


def masked(model: nn.Module, *tensors: str, recipe: td.Recipe | None = None) -> td.TargetedDropout:
    sparsifier = td.TargetedDropout(recipe or td.recipes.targeted_weight(), 0.5)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*are frozen")
        sparsifier.prepare(model, [{"tensor_fqn": name} for name in tensors] or None)
    sparsifier.step()
    return sparsifier


def dense(model: nn.Module, name: str) -> nn.Parameter:
    return dict(model.named_parameters())[name]


def zeros(weight: Tensor) -> float:
    return float((weight == 0).float().mean())


class TestTargets:
    def test_the_frozen_base_is_dropped_with_a_warning_and_adapters_are_not(self) -> None:
        model = adapted()
        sparsifier = td.TargetedDropout(td.recipes.targeted_weight(), 0.5)
        with pytest.warns(UserWarning, match=r"13 of 13 targets are frozen.*query\.base_layer.*peft\.merge"):
            sparsifier.prepare(model)
        report = sparsifier.report()
        names = {row.tensor for row in report.rows}
        assert BASE in names and not any("lora_" in name or "original_module" in name for name in names)
        assert "an adapter's" in report.skipped[FACTOR.format("A")]
        assert "modules_to_save" in report.skipped["base_model.model.classifier.original_module.weight"]
        assert report.skipped["base_model.model.classifier.modules_to_save.default.weight"] == "makes the logits"

    def test_units_whose_layers_are_all_wrapped(self) -> None:
        lora = LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear")
        model = get_peft_model(BertForSequenceClassification(CONFIG), lora)
        with pytest.raises(td.TdError, match=r"more: an adapter's delta goes past the mask.*merge_and_unload") as error:
            masked(model, recipe=td.recipes.targeted_unit())
        assert str(error.value).count("zeros in its factors") == 1

    def test_a_frozen_backbone_without_adapters(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        model[0].requires_grad_(False)
        with pytest.warns(UserWarning, match=r"1 of 2 targets are frozen .*first: 0\.weight.*unfreeze"):
            td.TargetedDropout(td.recipes.targeted_weight(), 0.5).prepare(model)

    def test_what_is_pruned_without_training_is_not_warned_about(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).requires_grad_(False)
        td.TargetedDropout(td.recipes.targeted_weight(), 0.5).prepare(model)

    def test_adapters_that_the_config_names(self) -> None:
        model = adapted().eval()
        masked(model, FACTOR.format("A"), FACTOR.format("B"))
        assert [zeros(dense(model, FACTOR.format(f))) for f in "AB"] == [0, 0]
        assert [zeros(model.get_submodule(FACTOR.format(f).rpartition(".")[0]).weight) for f in "AB"] == [0.5, 0.5]

    def test_adapters_learn_around_what_is_dropped(self) -> None:
        model = adapted().train()
        masked(model)
        ids = torch.arange(12).view(2, 6)
        model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
        assert dense(model, FACTOR.format("A")).grad.abs().sum() > 0
        assert dense(model, BASE).grad is None


class TestMerge:
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("safe", [True, False], ids=["safe", "in_place"])
    def test_pefts_own_merge_does_not_lose_the_delta_silently(self, training: bool, safe: bool) -> None:
        model = adapted().train(training)
        masked(model)
        before = dense(model, BASE).detach().clone()
        with pytest.raises(td.TdError, match=r"query\.base_layer\.weight.*with sparsifier\.dense"):
            model.merge_and_unload(safe_merge=safe)
        assert torch.equal(dense(model, BASE), before)

    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("unit", [False, True], ids=["weights", "units"])
    def test_the_merged_weight_is_ranked_with_its_delta(self, training: bool, unit: bool) -> None:
        plain, model = adapted().merge_and_unload().requires_grad_(True), adapted().train(training)
        recipe = td.recipes.targeted_unit() if unit else td.recipes.targeted_weight()
        sparsifier = masked(model, recipe=recipe)
        merged = merge(model)
        assert not sparsifier.groups
        expected = td.TargetedDropout(recipe, 0.5)
        names = [row.tensor.removeprefix("base_model.model.") for row in sparsifier.report().rows]
        expected.prepare(plain, [{"tensor_fqn": name.replace(".base_layer", "")} for name in names])
        expected.squash_mask()
        assert type(merged) is type(plain)
        state = merged.state_dict()
        assert all(torch.allclose(state[name], value, atol=1e-6) for name, value in plain.state_dict().items())
        name = "intermediate.dense" if unit else "attention.self.query"
        assert zeros(state[f"bert.encoder.layer.0.{name}.weight"]) == 0.5

    def test_inside_of_dense_and_unmerged_again(self) -> None:
        model, plain = adapted(), adapted()
        before = dense(model, BASE).detach().clone()
        sparsifier = masked(model)
        with sparsifier.dense():
            model.merge_adapter()
        plain.merge_adapter()
        assert torch.equal(dense(model, BASE), dense(plain, BASE))
        assert not torch.equal(dense(model, BASE), before)
        with sparsifier.dense():
            model.unmerge_adapter()
        torch.testing.assert_close(dense(model, BASE), before)

    def test_a_merge_of_dropped_adapters_changes_no_answer(self) -> None:
        model = adapted().eval()
        sparsifier = masked(model, FACTOR.format("A"), FACTOR.format("B"))
        ids = torch.arange(12).view(2, 6)
        before = model(input_ids=ids).logits
        torch.testing.assert_close(merge(model)(input_ids=ids).logits, before)
        assert not sparsifier.groups

    def test_a_merged_model_is_pruned_as_any_other(self) -> None:
        model = adapted().merge_and_unload()
        sparsifier = masked(model)
        sparsifier.squash_mask()
        assert zeros(model.bert.encoder.layer[0].attention.self.query.weight) == 0.5

    def test_masks_on_both_kinds(self) -> None:
        model = adapted()
        sparsifier = masked(model, BASE, FACTOR.format("A"))
        with pytest.raises(td.TdError, match=r"1 of 2 masked tensors are adapters'.*lora_A"):
            merge(model)
        assert len(sparsifier.groups) == 2

    def test_what_it_cannot_merge(self) -> None:
        with pytest.raises(td.TdError, match="not a PEFT model"):
            merge(nn.Linear(2, 2))
        with pytest.raises(td.TdError, match="squash=False"):
            merge(adapted())

    def test_a_copy_merges_too(self) -> None:
        model = adapted()
        sparsifier = masked(model)
        twin = copy.deepcopy(sparsifier)
        assert isinstance(twin.model, PeftModel)
        assert zeros(merge(twin.model).bert.encoder.layer[0].attention.self.query.weight) == 0.5
        assert zeros(dense(model, BASE)) == 0


def rows(count: int = 12) -> list[dict[str, Tensor]]:
    ids = torch.randint(1, 50, (count, 6), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": (row[0] > 25).long()} for row in ids]


def trained(out: Path, resume: bool = False) -> tuple[Trainer, TargetedDropoutCallback]:
    recipe = td.recipes.ramping_targeted_unit()
    callback = TargetedDropoutCallback(recipe, 0.5, recipe_steps=0.5, squash=False)
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=4,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(adapted(), arguments, train_dataset=rows(), eval_dataset=rows(), callbacks=[callback])
    with pytest.warns(UserWarning, match=r"are frozen .*peft\.merge"):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-2") if resume else None)
    return trainer, callback


class TestTrainer:
    def test_adapters_train_resume_merge_and_shrink(self, tmp_path: Path) -> None:
        trainer, _ = trained(tmp_path)
        before = dict(adapted().named_parameters())
        after = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        changed = {name for name, p in after.items() if not torch.equal(p, before[name])}
        assert changed and all("lora_" in name or "modules_to_save" in name for name in changed)
        again, callback = trained(tmp_path, resume=True)
        assert all(torch.equal(p, after[name]) for name, p in again.model.named_parameters())
        plain = merge(again.model).eval()
        assert callback.sparsifier is not None and not callback.sparsifier.groups
        assert zeros(plain.bert.encoder.layer[0].intermediate.dense.weight) == 0.5
        small = shrink(plain, round_to=1)
        assert small.bert.encoder.layer[0].intermediate.dense.out_features == 16
        ids = torch.stack([row["input_ids"] for row in rows()])
        torch.testing.assert_close(small(input_ids=ids).logits, plain(input_ids=ids).logits)


def stored_as(dtype: torch.dtype) -> nn.Linear:
    """As bitsandbytes' layers: a Linear whose weight holds no floating-point numbers."""
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=dtype), requires_grad=False)
    return layer


class Packed(Tensor):
    """As torchao's: says that it is of floating point, and keeps integers."""

    @staticmethod
    def __new__(cls, integers: Tensor) -> Packed:
        return Tensor._make_wrapper_subclass(cls, integers.shape, dtype=torch.float32)  # type: ignore[no-any-return]

    def __init__(self, integers: Tensor) -> None:
        self.integers = integers

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["integers"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: None, size: object, stride: object) -> Packed:
        return Packed(inner["integers"])

    @classmethod
    def __torch_dispatch__(cls, func: object, types: object, args: tuple[Tensor, ...] = (), kwargs: object = None):  # type: ignore[no-untyped-def]
        return Packed(args[0].integers)  # type: ignore[attr-defined]


def wrapped() -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(Packed(torch.zeros(4, 4, dtype=torch.int8)), requires_grad=False)
    return layer


class GptqLayer(nn.Module):
    """As those of GPTQ and AWQ."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))


QUANTIZED = {
    "uint8": (lambda: stored_as(torch.uint8), "stored as uint8"),
    "int8": (lambda: stored_as(torch.int8), "stored as int8"),
    "subclass": (wrapped, "stored as Packed"),
    "gptq": (GptqLayer, "GptqLayer keeps its weight in a buffer"),
}


class TestQuantized:
    @pytest.mark.parametrize("unit", [False, True], ids=["weights", "units"])
    @pytest.mark.parametrize("case", list(QUANTIZED))
    def test_it_is_left_alone_and_said_why(self, case: str, unit: bool) -> None:
        make, reason = QUANTIZED[case]
        recipe = td.recipes.targeted_unit() if unit else td.recipes.targeted_weight()
        with pytest.raises(td.TdError, match=f"nothing to prune.*{reason}"):
            td.TargetedDropout(recipe, 0.5).prepare(nn.Sequential(make(), nn.Linear(4, 2)))
        model = nn.Sequential(make(), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        sparsifier = masked(model, recipe=recipe)
        assert [row.tensor for row in sparsifier.report().rows] == ["2.weight"]
        assert any(reason in why for why in sparsifier.report().skipped.values())

    @pytest.mark.parametrize("case", ["uint8", "int8", "subclass"])
    def test_the_config_cannot_name_it(self, case: str) -> None:
        make, reason = QUANTIZED[case]
        model = nn.Sequential(make(), nn.Linear(4, 2))
        with pytest.raises(td.TdError, match=rf"0\.weight.*{reason}.*quantize afterwards"):
            masked(model, "0.weight")
