"""The loss from hidden states, a few rows of logits at a time, against cross-entropy over all logits at once."""

from collections.abc import Callable

import pytest
import torch
from largest_tensor import LargestTensor
from tiny import VOCABULARY, randomize, some_ids, tiny_gpt2, tiny_llama
from tiny_decoders import tiny_decoder
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM

from minipeft import BottleneckConfig, LoraConfig, PeftConfig, TrainableTokensConfig, get_peft_model
from minipeft.train import loss
from minipeft.train.batches import Batch, collate
from minipeft.train.encoding import Example
from minipeft.train.loss import head_loss_sum, split_model, token_loss_sum, training_loss_sum

ROWS, HIDDEN, VOCAB = 11, 6, 20


@pytest.fixture(autouse=True)
def three_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 3 * VOCAB)


def case(bias: bool, trained: bool, dtype: torch.dtype) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCAB, bias=bias, dtype=dtype).requires_grad_(trained)
    hidden = torch.randn(ROWS, HIDDEN, dtype=dtype, requires_grad=True)
    return head, hidden, torch.randint(0, VOCAB, (ROWS,))


def gradients(loss: Tensor, tensors: list[Tensor], upstream: float) -> list[Tensor]:
    return list(torch.autograd.grad(loss * upstream, tensors))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_loss_and_every_gradient_equal_cross_entropy_in_float64(bias: bool, trained: bool) -> None:
    head, hidden, labels = case(bias, trained, torch.float64)
    wanted = [hidden, *(head.parameters() if trained else ())]
    ours = head_loss_sum(head, hidden, labels)
    theirs = F.cross_entropy(head(hidden), labels, reduction="sum")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for got, expected in zip(gradients(ours, wanted, 0.3), gradients(theirs, wanted, 0.3), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_narrow_dtypes_are_summed_in_float32(dtype: torch.dtype, tolerance: float) -> None:
    head, hidden, labels = case(True, False, dtype)
    ours = head_loss_sum(head, hidden, labels)
    exact = hidden.detach().double().requires_grad_()
    theirs = F.cross_entropy(F.linear(exact, head.weight.double(), head.bias.double()), labels, reduction="sum")
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=0)
    (got,), (expected,) = gradients(ours, [hidden], 1.0), gradients(theirs, [exact], 1.0)
    assert (got.double() - expected).norm() < tolerance * expected.norm()


def test_large_logits_do_not_overflow() -> None:
    head, hidden, labels = case(False, False, torch.float32)
    ours = head_loss_sum(head, hidden * 1e4, labels)
    theirs = F.cross_entropy(head(hidden * 1e4), labels, reduction="sum")
    assert torch.isfinite(ours)
    torch.testing.assert_close(ours, theirs)


def test_no_labels_give_zero() -> None:
    head, hidden, labels = case(True, True, torch.float32)
    loss = head_loss_sum(head, hidden[:0], labels[:0])
    assert loss == 0 and not gradients(loss, [hidden], 1.0)[0].any()


def test_without_gradients_the_loss_is_the_same() -> None:
    head, hidden, labels = case(True, False, torch.float64)
    with torch.no_grad():
        plain = head_loss_sum(head, hidden, labels)
    torch.testing.assert_close(plain, head_loss_sum(head, hidden, labels).detach(), rtol=1e-12, atol=0)


def test_all_logits_never_exist_at_once() -> None:
    rows, vocabulary = 64, 500
    head = nn.Linear(HIDDEN, vocabulary).requires_grad_(False)
    hidden = torch.randn(rows, HIDDEN, requires_grad=True)
    with LargestTensor() as largest:
        head_loss_sum(head, hidden, torch.zeros(rows, dtype=torch.int64)).backward()
    assert largest.nbytes <= vocabulary * HIDDEN * 4 < rows * vocabulary * 4 / 8


def batch_of(ids: Tensor) -> Batch:
    labels = ids.clone()
    labels[:, :3] = -100
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Batch(inputs=inputs, labels=labels, tokens=ids.numel(), loss_tokens=int((labels[:, 1:] != -100).sum()))


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("targets", ["all-linear", ["lm_head"]])
def test_a_models_step_equals_that_over_its_logits(build: Callable[[], nn.Module], targets: str | list[str]) -> None:
    model = get_peft_model(build(), LoraConfig(target_modules=targets, task_type="CAUSAL_LM"))
    randomize(model)
    assert split_model(model) is not None
    batch = batch_of(some_ids())
    trained = [p for p in model.parameters() if p.requires_grad]
    logits = model(**batch.inputs).logits[:, :-1]
    theirs = F.cross_entropy(logits.reshape(-1, VOCABULARY), batch.labels[:, 1:].reshape(-1), reduction="sum")
    ours = token_loss_sum(model, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    for got, expected in zip(gradients(ours, trained, 1.0), gradients(theirs, trained, 1.0), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["lm_head", "embed_tokens"], ensure_weight_tying=True, init_lora_weights=False),
        LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 5]),
        TrainableTokensConfig(token_indices=[1, 5]),
        BottleneckConfig(reduction_factor=8, inv_adapter="nice", inv_adapter_reduction_factor=2),
    ],
    ids=["factors", "rows beside LoRA", "rows", "a network"],
)
def test_what_a_head_reads_of_the_input_embeddings_gets_its_gradient(config: PeftConfig) -> None:
    """Through the head as through the embeddings, of which the tensors are: autograd over all logits is the oracle."""
    tied = not isinstance(config, BottleneckConfig)
    model = get_peft_model(tiny_llama(tie_word_embeddings=tied), config).double().train()
    trained = [p for p in model.parameters() if p.requires_grad]
    batch = batch_of(some_ids())
    assert split_model(model) is not None
    ours = gradients(token_loss_sum(model, batch), trained, 1.0)
    logits = model(**batch.inputs).logits[:, :-1].flatten(0, 1)
    theirs = gradients(F.cross_entropy(logits, batch.labels[:, 1:].flatten(), reduction="sum"), trained, 1.0)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_a_model_that_changes_its_logits_is_not_split() -> None:
    assert split_model(tiny_decoder("gemma2", final_logit_softcapping=1.0)) is None


def test_hooks_on_the_model_or_its_head_are_not_passed_over() -> None:
    for hooked in (lambda m: m, lambda m: m.lm_head):
        model = tiny_llama()
        handle = hooked(model).register_forward_hook(lambda *_: None)
        assert split_model(model) is None
        handle.remove()
        assert split_model(model) is not None


def test_trying_a_model_leaves_its_modes_alone() -> None:
    model = tiny_llama().train()
    model.model.layers[0].eval()
    split_model(model)
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training


@pytest.mark.parametrize("micro", [1, 2])
def test_the_balancing_loss_of_a_mixture_is_transformers(micro: int) -> None:
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MixtralForCausalLM(config)
    ids = torch.randint(0, 64, (2 * micro, 16))
    examples = [Example(row, row) for row in ids.tolist()]
    batches = [collate(examples[i * 2 : i * 2 + 2], pad_id=0) for i in range(micro)]
    tokens = sum(batch.loss_tokens for batch in batches)
    total = sum(training_loss_sum(model, batch) for batch in batches) / tokens
    # Micro-batches of as many tokens: the mean of transformers' losses.
    theirs = sum(model(ids[i * 2 : i * 2 + 2], labels=ids[i * 2 : i * 2 + 2]).loss for i in range(micro)) / micro
    torch.testing.assert_close(total, theirs, rtol=1e-5, atol=1e-5)
    plain = sum(token_loss_sum(model, batch) for batch in batches) / tokens
    assert (theirs - plain).abs() > 0.1
