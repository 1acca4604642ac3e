import math

import pytest
import torch
from tiny import VOCABULARY
from tiny_runs import make_data, make_model
from torch.nn import functional as F

from minipeft.train import Batches, accuracy, classify, encode_pair, evaluate_loss
from minipeft.train.loss import token_loss_sum


@pytest.mark.parametrize(("batch_size", "packing"), [(1, False), (3, False), (2, True)])
def test_loss_weights_every_token_alike(batch_size, packing):
    model, data = make_model(dropout=0.5).train(), make_data(11)
    losses = []
    model.eval()
    for example in data.examples:
        logits = model(torch.tensor([example.input_ids])).logits[0, :-1]
        target = torch.tensor(example.labels[1:])
        losses.append(F.cross_entropy(logits, target, reduction="none")[target >= 0])
    expected = torch.cat(losses).mean().item()
    model.train()
    result = evaluate_loss(model, Batches(data.examples, batch_size, packing=packing, max_length=32))
    assert model.training, "evaluation leaves the mode as it was"
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert result.tokens == data.loss_tokens
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)


def test_loss_is_that_of_transformers():
    model, data = make_model(), make_data(5)
    batch = next(iter(Batches(data.examples, 5)))
    expected = model(**batch.inputs, labels=batch.labels).loss
    torch.testing.assert_close(token_loss_sum(model, batch) / batch.loss_tokens, expected)


def test_head_runs_on_learned_positions_only():
    model, data = make_model(), make_data(5)
    rows = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[:-1].numel()))
    batch = next(iter(Batches(data.examples, 5)))
    token_loss_sum(model, batch)
    assert rows == [batch.loss_tokens]


def test_model_that_computes_all_logits_gives_the_same_loss(monkeypatch):
    model, data = make_model(), make_data(5)
    batch = next(iter(Batches(data.examples, 5)))
    expected = token_loss_sum(model, batch)
    monkeypatch.setattr("minipeft.train.loss._keeps_logits", lambda model: False)
    torch.testing.assert_close(token_loss_sum(model, batch), expected)


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate_loss(make_model(), [])


LABELS = [" very positive", " positive", " neutral", " negative", " very negative"]
PROMPTS = ["The film was", "A very bad film, negative in every way.", "one two three"]


@pytest.fixture(scope="module")
def large_model():
    return make_model(vocab_size=400)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_classify_scores_are_the_labels_log_likelihoods(large_model, tokenizer, batch_size):
    result = classify(large_model, tokenizer, PROMPTS, LABELS, batch_size=batch_size)
    for i, prompt in enumerate(PROMPTS):
        for j, label in enumerate(LABELS):
            prompt_ids, label_ids = encode_pair(tokenizer, prompt, label)
            with torch.no_grad():
                logits = large_model(torch.tensor([prompt_ids + label_ids])).logits[0]
            log_probs = logits.log_softmax(-1)[len(prompt_ids) - 1 : -1]
            expected = log_probs[range(len(label_ids)), label_ids].sum().item()
            assert result.log_likelihoods[i, j].item() == pytest.approx(expected, abs=1e-4)
    assert result.predictions == result.log_likelihoods.argmax(-1).tolist()


def test_labels_that_share_tokens_share_a_forward_pass(large_model, tokenizer):
    done = []
    classify(large_model, tokenizer, PROMPTS, LABELS, progress=done.append)
    assert len(encode_pair(tokenizer, PROMPTS[0], LABELS[0])[1]) > 1, "labels of several tokens are needed here"
    assert done[-1] == len(PROMPTS)


def test_labels_that_differ_early_cost_a_pass_each(large_model, tokenizer):
    done = []
    classify(large_model, tokenizer, PROMPTS[:1], ["xq", "zq"], progress=done.append)
    assert done[-1] == 2


def test_label_that_begins_another_is_refused(large_model, tokenizer):
    with pytest.raises(ValueError, match="label ' very' is the beginning of label ' very positive'"):
        classify(large_model, tokenizer, PROMPTS, [" very", " very positive"])
    with pytest.raises(ValueError, match="at least two labels"):
        classify(large_model, tokenizer, PROMPTS, [" very"])


def test_accuracy_has_its_error_and_baseline():
    result = accuracy(["a", "b", "b", "c"], ["a", "b", "c", "c"])
    assert (result.accuracy, result.majority, result.n) == (0.75, 0.5, 4)
    assert result.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    with pytest.raises(ValueError, match="got 1 and 2"):
        accuracy(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="at least 1"):
        accuracy([], [])


def test_vocabulary_of_the_tokenizer_fits_the_model(tokenizer):
    assert VOCABULARY < len(tokenizer) <= 400
