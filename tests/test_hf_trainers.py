"""Trainers and features of the Trainer that the callback has to live with."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_hf import assert_equal, callback, make_model, make_trainer, rows, weights
from test_hf_side_by_side import accuracy
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    set_seed,
    trainer_jit_checkpoint,
)

import td_plugin as td
from td_plugin.integrations.hf import TargetedDropoutCallback
from td_plugin.integrations.interrupted import last_complete_checkpoint
from td_plugin.integrations.side_by_side import SideBySide
from td_plugin.parametrization import masked_tensors

NEURONS = "bert.encoder.layer.0.intermediate.dense.weight"


def silent(model: nn.Module, name: str = NEURONS) -> float:
    """The share of rows that are zero."""
    return float((model.get_parameter(name) == 0).all(1).float().mean())


def test_early_stopping_leaves_the_model_pruned_at_the_target(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "max_steps": 12}
    trainer = make_trainer(tmp_path, make_model(), callback(0.75), metric_for_best_model="loss", **options)
    trainer.add_callback(EarlyStoppingCallback(1, early_stopping_threshold=10.0))
    trainer.train()
    assert trainer.state.global_step == 4, "two evaluations, of which the second is no improvement by 10"
    assert silent(trainer.model) == 0.75
    assert not masked_tensors(trainer.model)


def test_metrics_of_several_evaluation_sets_are_of_what_ships(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "max_steps": 2}
    mine = callback(0.75)
    trainer = make_trainer(tmp_path, make_model(), mine, metric_for_best_model="eval_b_accuracy", **options)
    trainer.eval_dataset, trainer.compute_metrics = {"a": rows(), "b": rows(6)}, accuracy
    trainer.train()
    judged = {}
    for entry in trainer.state.log_history:
        judged.update({name: value for name, value in entry.items() if name in SHOWN})
    shipped = trainer.evaluate()
    assert {name: shipped[name] for name in SHOWN} == pytest.approx(judged, abs=1e-6)
    assert trainer.state.best_metric == judged["eval_b_accuracy"]


SHOWN = ("eval_a_loss", "eval_a_accuracy", "eval_b_loss", "eval_b_accuracy")


def test_pitfall_8_checkpointed_activations_train_the_same_model(tmp_path: Path) -> None:
    found = []
    for option in (False, True):
        options = {"activation_checkpointing": option, "max_steps": 3, "save_strategy": "no"}
        trainer = make_trainer(tmp_path, make_model(), callback(0.75), **options)
        trainer.train()
        assert trainer.model.is_activation_checkpointing is option
        found.append(weights(trainer.model))
    assert_equal(*found)


def test_label_smoothing_goes_on_the_masked_model(tmp_path: Path) -> None:
    losses = []
    for factor in (0.0, 0.3):
        trainer = make_trainer(
            tmp_path, make_model(), callback(0.75), max_steps=2, label_smoothing_factor=factor, save_strategy="no"
        )
        losses.append(trainer.train().training_loss)
        assert silent(trainer.model) == 0.75
    assert losses[0] != losses[1]


class OutOfMemory(Trainer):
    """The GPU of whoever trains with more than two rows at a time."""

    seen: list[int]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append(len(inputs["input_ids"]))
        if self.seen[-1] > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return super().training_step(model, inputs, *args, **kwargs)


@pytest.mark.slow
def test_pitfall_6_auto_find_batch_size_starts_again_on_the_same_masks(tmp_path: Path) -> None:
    mine = callback(0.75, squash=False)
    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    cls = type("Loop", (OutOfMemory,), {"seen": []})
    trainer = make_trainer(tmp_path, make_model(), mine, cls=cls, num_train_epochs=1, save_strategy="no", **options)
    trainer.train()
    assert cls.seen[0] == 4 and cls.seen[-1] <= 2
    assert mine.sparsifier is not None and mine.sparsifier.step_count == trainer.state.global_step
    named = masked_tensors(trainer.model)
    assert named and len(named) == len(set(named)), "one mask on every tensor"
    mine.sparsifier.squash_mask()
    assert silent(trainer.model) == 0.75


class Interrupts(TrainerCallback):
    """Sends a signal to this process behind one step, once."""

    def __init__(self, event: str, step: int, sent: signal.Signals) -> None:
        self.step, self.sent, self.done = step, sent, False
        setattr(self, event, self._send)

    def _send(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step and not self.done:
            self.done = True
            os.kill(os.getpid(), self.sent)
            time.sleep(0.3)  # the handler runs here, and the Trainer's timer


def recipes() -> dict[str, td.Recipe]:
    return {"ramping": td.recipes.ramping_targeted_unit(0.9), "surgery": td.recipes.network_surgery(0.5)}


SLOW = pytest.mark.slow


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own handler: a shell starts background jobs with SIGINT ignored, and then Python sets none up."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(
    ("recipe", "same"),
    [
        pytest.param("surgery", False, marks=SLOW),
        pytest.param("surgery", True, marks=SLOW),
        pytest.param("ramping", False, marks=SLOW),
        pytest.param("ramping", True, marks=SLOW),
    ],
)
def test_pitfall_6_after_sigint_the_run_goes_on_bit_for_bit(tmp_path: Path, recipe: str, same: bool) -> None:
    def make() -> TargetedDropoutCallback:
        return TargetedDropoutCallback(recipes()[recipe], 0.5)

    whole = make_trainer(tmp_path / "whole", make_model(), make(), max_steps=6)
    whole.train()
    trainer = make_trainer(tmp_path / "cut", make_model(), make(), max_steps=6)
    trainer.add_callback(Interrupts("on_step_end", 5, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert masked_tensors(trainer.model), "no event says that training is over"
    plain = tmp_path / "plain"
    trainer.save_model(str(plain))
    assert load_file(plain / "model.safetensors").keys() == weights(whole.model).keys()
    checkpoint = last_complete_checkpoint(tmp_path / "cut")
    assert checkpoint == str(tmp_path / "cut" / "checkpoint-4")
    again = trainer if same else make_trainer(tmp_path / "cut", make_model(seed=9), make(), max_steps=6)
    again.train(resume_from_checkpoint=checkpoint)
    assert_equal(weights(whole.model), weights(again.model))


@pytest.mark.parametrize("recipe", ["surgery", pytest.param("ramping", marks=SLOW)])
@pytest.mark.parametrize(
    "event", ["on_optimizer_step", pytest.param("on_step_end", marks=SLOW), pytest.param("on_step_begin", marks=SLOW)]
)
def test_sigterm_saves_and_the_run_goes_on_bit_for_bit(
    tmp_path: Path, recipe: str, event: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> TargetedDropoutCallback:
        return TargetedDropoutCallback(recipes()[recipe], 0.5)

    plain = trainer_jit_checkpoint.CheckpointManager.__init__
    monkeypatch.setattr(
        trainer_jit_checkpoint.CheckpointManager, "__init__", lambda self, trainer: plain(self, trainer, kill_wait=0)
    )
    # Ordinary dropout off: in the middle of a step the Trainer saves the generators as they are there.
    options: dict[str, Any] = {"max_steps": 6, "save_strategy": "no", "enable_jit_checkpoint": True}
    whole = make_trainer(tmp_path / "whole", make_model(0.0), make(), **options)
    whole.train()
    trainer = make_trainer(tmp_path / "cut", make_model(0.0), make(), **options)
    trainer.add_callback(Interrupts(event, 3, signal.SIGTERM))
    trainer.train()
    assert 3 <= trainer.state.global_step < 6
    checkpoint = last_complete_checkpoint(tmp_path / "cut")
    assert checkpoint is not None
    again = make_trainer(tmp_path / "cut", make_model(0.0, seed=9), make(), **options)
    again.train(resume_from_checkpoint=checkpoint)
    assert_equal(weights(whole.model), weights(again.model))


def tiny_t5() -> T5ForConditionalGeneration:
    set_seed(0)
    config = T5Config(
        vocab_size=50, d_model=16, d_ff=24, num_layers=1, num_heads=2, d_kv=8, decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


class Both(SideBySide, Seq2SeqTrainer):
    """As the documentation of `SideBySide` says."""


@pytest.mark.slow
@pytest.mark.parametrize("cls", [Seq2SeqTrainer, Both])
def test_seq2seq_generates_with_the_pruned_model_and_resumes(tmp_path: Path, cls: type[Seq2SeqTrainer]) -> None:
    seen: list[Any] = []

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction.predictions)
        return {"length": float(prediction.predictions.shape[1])}

    def make(out: Path, model: nn.Module) -> Seq2SeqTrainer:
        arguments = Seq2SeqTrainingArguments(
            str(out), max_steps=4, save_steps=2, eval_strategy="steps", eval_steps=2, predict_with_generate=True,
            generation_max_length=6, report_to="none", use_cpu=True, disable_tqdm=True, per_device_train_batch_size=2,
            learning_rate=1e-2, gradient_accumulation_steps=2,
        )  # fmt: skip
        data = [{"input_ids": row["input_ids"], "labels": row["input_ids"][:4]} for row in rows(8)]
        mine = TargetedDropoutCallback(td.recipes.ramping_targeted_unit(0.9), 0.5)
        return cls(model, arguments, train_dataset=data, eval_dataset=data, compute_metrics=metrics, callbacks=[mine])

    whole = make(tmp_path / "whole", tiny_t5())
    whole.train()
    assert len(seen) == (4 if cls is Both else 2)
    resumed = make(tmp_path / "resumed", tiny_t5())
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_equal(weights(whole.model), weights(resumed.model))
    judged = seen[-2 if cls is Both else -1]
    shipped = whole.predict(whole.eval_dataset).predictions
    assert (shipped == judged).all(), "what was generated is what ships generates"


class Counts(TorchDispatchMode):
    """What reaches the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "recipe", [td.recipes.targeted_weight(0.5), td.recipes.targeted_unit(0.5)], ids=lambda r: r.name
)
def test_pitfall_16_generate_runs_the_operators_of_the_dense_model(recipe: td.Recipe) -> None:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()

    def operators(tokens: int) -> Counter[str]:
        with torch.inference_mode(), Counts() as counts:
            model.generate(torch.tensor([[5, 6]]), min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
        return counts.seen

    dense = operators(8) - operators(4)
    sparsifier = td.TargetedDropout(recipe, 0.5)
    sparsifier.prepare(model)
    model.train()
    sparsifier.step()
    model.eval()
    first, shorter, longer = operators(8), operators(4), operators(8)
    assert longer - shorter == dense, "four tokens more cost what they cost the dense model"
    assert sum((first - longer).values()) > 0, "the masked weights are made once, by the first forward"
    assert longer == operators(8)


@pytest.mark.slow
def test_hyperparameter_search_reaches_recipe_and_level(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.disable_default_handler()
    seen = []

    def of_trial(values: dict[str, Any]) -> tuple[td.Recipe, float]:
        return td.recipes.ramping_targeted_unit(values["drop_rate"]), values["sparsity_level"]

    class Watches(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
            assert mine.sparsifier is not None
            seen.append({**(state.trial_params or {}), "drop_rate of recipe": mine.sparsifier.recipe.drop_rate,
                         "silent": silent(model)})  # fmt: skip

    mine = TargetedDropoutCallback(td.recipes.ramping_targeted_unit(), 0.5, on_trial=of_trial)
    options = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"}
    trainer = make_trainer(tmp_path, None, mine, model_init=lambda: make_model(seed=1), **options)
    trainer.add_callback(Watches())

    def space(trial: Any) -> dict[str, Any]:
        trial.suggest_categorical("sparsity_level", [0.25, 0.75])
        trial.suggest_categorical("drop_rate", [0.3, 0.6])
        return {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)}

    best = trainer.hyperparameter_search(
        space, n_trials=4, direction="minimize", sampler=optuna.samplers.RandomSampler(seed=1)
    )
    assert len(seen) == 4 and {trial["sparsity_level"] for trial in seen} == {0.25, 0.75}
    for trial in seen:
        assert trial["silent"] == trial["sparsity_level"]
        assert trial["drop_rate of recipe"] == trial["drop_rate"]
    assert {"sparsity_level", "drop_rate", "learning_rate"} == set(best.hyperparameters)
    trainer.train()
    assert silent(trainer.model) == 0.5, "outside of a search the callback's own arguments hold"


class Hub:
    """The hub, as far as the Trainer calls it."""

    def __init__(self) -> None:
        self.pushed: list[dict[str, torch.Tensor]] = []

    def upload_folder(self, folder_path: str, **_: Any) -> Any:
        self.pushed.append(load_file(Path(folder_path, "model.safetensors")))
        return Done()


class Done:
    """An upload that is over."""

    def done(self) -> bool:
        return True

    def result(self) -> None:
        return None


def test_what_is_pushed_is_the_plain_pruned_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import trainer as module

    hub = Hub()
    monkeypatch.setattr(module, "hf_api", lambda: hub)
    monkeypatch.setattr(
        Trainer, "init_hf_repo", lambda self, **_: vars(self).update(hub_model_id="me/x", push_in_progress=None)
    )
    monkeypatch.setattr(Trainer, "create_model_card", lambda self, **_: None)
    trainer = make_trainer(tmp_path, make_model(), callback(0.75), max_steps=4, push_to_hub=True, hub_model_id="me/x")
    trainer.train()
    plain = weights(make_model()).keys()
    assert hub.pushed and all(pushed.keys() == plain for pushed in hub.pushed), "checkpoints on the way"
    trainer.push_to_hub()
    assert_equal(hub.pushed[-1], weights(trainer.model))
    assert float((hub.pushed[-1][NEURONS] == 0).all(1).float().mean()) == 0.75


def sft_parts() -> tuple[Any, list[str]]:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(f"w{index}" for index in range(20))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    return tokenizer, [" ".join(f"w{(row + place) % 20}" for place in range(6)) for row in range(12)]


@pytest.mark.slow  # importing trl takes seconds
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_sft_trainer(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    tokenizer, texts = sft_parts()

    def make(out: Path) -> Any:
        set_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )  # fmt: skip
        arguments = trl.SFTConfig(
            str(out), max_steps=4, save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, max_length=16,
            per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, bf16=False,
        )  # fmt: skip
        return trl.SFTTrainer(
            LlamaForCausalLM(config), args=arguments, train_dataset=Dataset.from_dict({"text": texts}),
            processing_class=tokenizer,
            callbacks=[TargetedDropoutCallback(td.recipes.ramping_targeted_unit(0.9), 0.5)],
        )  # fmt: skip

    whole = make(tmp_path / "whole")
    whole.train()
    resumed = make(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_equal(weights(whole.model), weights(resumed.model))
    assert silent(whole.model, "model.layers.0.mlp.gate_proj.weight") == 0.5
    assert not masked_tensors(whole.model)


@pytest.mark.slow
def test_pitfall_10_no_graph_break_and_no_recompilation_while_levels_ramp(tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    graphs: list[int] = []

    class Watches(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            graphs.append(counters["stats"]["unique_graphs"])

    options = {
        "gradient_accumulation_steps": 2,
        "max_steps": 5,
        "save_strategy": "no",
        "per_device_train_batch_size": 2,
    }
    eager = make_trainer(tmp_path, make_model(0.0), callback(0.75), **options)
    eager.train()
    torch.compiler.reset()
    counters.clear()
    compiled = make_trainer(
        tmp_path, make_model(0.0), callback(0.75), torch_compile=True, torch_compile_backend="aot_eager", **options
    )
    compiled.add_callback(Watches())
    compiled.train()
    assert graphs[0] >= 1 and graphs[0] == graphs[-1], f"graphs after each step: {graphs}"
    assert not counters["graph_break"], dict(counters["graph_break"])
    found, wanted = weights(compiled.model), weights(eager.model)
    assert all(torch.allclose(found[name], wanted[name], atol=1e-5) for name in wanted)
