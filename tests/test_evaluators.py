"""Evaluators and wrappers around adapted models: as objects and from our folders, with the numbers that PEFT has there.

The code of docs/tools.md runs here. Packages that the tests do not install are skipped by name.
"""

import contextlib
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_folder import byte_tokenizer, save_model, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, pipeline

import minipeft
from minipeft import get_peft_model

METHODS = {
    "lora": lambda package: package.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    ),
    "prompt": lambda package: package.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": lambda package: package.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}
QUESTIONS = [
    {"question": "Two and two are", "choices": [" four", " five", " a pair"], "answer": 0},
    {"question": "Snow is", "choices": [" black", " white"], "answer": 1},
    {"question": "A day has", "choices": [" hours", " wings", " no end"], "answer": 0},
]
# Of the packages' own making.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a base model, an adapter beside it and the two merged."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "base")
    adapt("lora")
    model = minipeft.PeftModel.from_pretrained(base(), "run/adapter")
    model.merge_and_unload().save_pretrained("merged")
    AutoTokenizer.from_pretrained("base").save_pretrained("merged")
    write_jsonl(tmp_path / "questions.jsonl", QUESTIONS)
    return tmp_path


def base() -> Any:
    return AutoModelForCausalLM.from_pretrained("base")


def adapt(method: str) -> None:
    """Write an adapter that does something to run/adapter."""
    torch.manual_seed(0)
    model = get_peft_model(base(), METHODS[method](minipeft))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained("run/adapter")


def run_block(title: str, session: dict[str, Any]) -> dict[str, Any]:
    """Run the code of one section of docs/tools.md; its names."""
    text = (Path(__file__).parent.parent / "docs/tools.md").read_text()
    (block,) = re.findall(rf"### {title}\n+```python\n(.*?)```", text, re.DOTALL)
    exec(compile(block, f"docs/tools.md, {title}", "exec"), session)
    return session


def scores(harness: Any) -> list[float]:
    """Log-likelihoods of continuations and of a text, and whether greedy search gives the continuations."""
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    pairs = [("Hello wor", "ld"), ("a", " b c, and d"), ("", "so")]
    likely = harness.loglikelihood([instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True)
    texts = [instance("loglikelihood_rolling", {}, ("Hello world, this is a text.",), 0)]
    rolling = harness.loglikelihood_rolling(texts, disable_tqdm=True)
    return [number for pair in likely for number in pair] + list(rolling)


@pytest.mark.parametrize("method", METHODS)
def test_lm_eval_has_pefts_numbers(folder: Path, method: str) -> None:
    harness = pytest.importorskip("lm_eval.models.huggingface", reason="lm_eval is not installed").HFLM
    adapt(method)
    tokenizer = AutoTokenizer.from_pretrained("base")
    make: Callable[..., Any] = lambda model: harness(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=2)  # noqa: E731
    model = minipeft.PeftModel.from_pretrained(base(), "run/adapter")
    ours = scores(make(model))
    assert ours == pytest.approx(scores(make(peft.PeftModel.from_pretrained(base(), "run/adapter"))), abs=1e-4)
    assert ours == pytest.approx(scores(harness(pretrained="base", peft="run/adapter", device="cpu")), abs=1e-4)
    with model.disable_adapter():
        assert scores(make(model)) == pytest.approx(scores(harness(pretrained="base", device="cpu")), abs=1e-5)
    assert ours != pytest.approx(scores(harness(pretrained="base", device="cpu")), abs=1e-2)


def test_lm_eval_measures_the_merged_folder_and_a_task_of_ones_own(folder: Path) -> None:
    harness = pytest.importorskip("lm_eval.models.huggingface", reason="lm_eval is not installed").HFLM
    session = run_block("lm-evaluation-harness", {})
    merged = harness(pretrained="merged", device="cpu")
    assert scores(session["harness"]) == pytest.approx(scores(merged), abs=1e-4)
    # The task's number from the model's own logits: of a question's choices, the likeliest.
    right = 0
    tokenizer, model = AutoTokenizer.from_pretrained("base"), AutoModelForCausalLM.from_pretrained("merged")
    for question in QUESTIONS:
        sums = []
        for choice in question["choices"]:
            start, ids = (
                tokenizer(text)["input_ids"] for text in (question["question"], question["question"] + choice)
            )
            logits = model(torch.tensor([ids])).logits[0, len(start) - 1 : -1].log_softmax(-1)
            sums.append(logits.gather(1, torch.tensor(ids[len(start) :])[:, None]).sum().item())
        right += sums.index(max(sums)) == question["answer"]
    assert session["results"]["acc,none"] == pytest.approx(right / len(QUESTIONS))


def encoder_folder() -> None:
    """A tiny BERT with its tokenizer, and the pooling of sentence-transformers."""
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 64
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)).save_pretrained("bert")
    tokenizer.save_pretrained("bert")
    from sentence_transformers import SentenceTransformer

    SentenceTransformer(modules=[modules.Transformer("bert"), modules.Pooling(32)], device="cpu").save("encoder")


def test_sentence_transformers_train_save_and_merge_as_with_peft(folder: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    encoder_folder()
    import datasets
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    texts = ["a sentence", "another, longer one", "a third"]
    pairs = datasets.Dataset.from_dict({"anchor": texts * 4, "positive": [text + "!" for text in texts * 4]})
    settings = {"max_steps": 3, "logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    settings |= {"save_strategy": "no", "learning_rate": 1e-2, "output_dir": "out"}

    def trained(encoder: Any) -> list[float]:
        torch.manual_seed(0)
        loss = MultipleNegativesRankingLoss(encoder)
        trainer = SentenceTransformerTrainer(encoder, Arguments(**settings), pairs, loss=loss)
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    encoder = SentenceTransformer("encoder", device="cpu")
    plain = encoder.encode(texts)
    config = minipeft.LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
    get_peft_model(encoder[0].auto_model, config).save_pretrained("start")
    theirs = SentenceTransformer("encoder", device="cpu")
    theirs.load_adapter("start", is_trainable=True)
    assert encoder.encode(texts) == pytest.approx(theirs.encode(texts), abs=1e-6)
    assert trained(encoder) == pytest.approx(trained(theirs), rel=1e-5)
    after = encoder.encode(texts)
    assert abs(after - plain).max() > 1e-3

    encoder.save_pretrained("adapted")
    assert SentenceTransformer("adapted", device="cpu").encode(texts) == pytest.approx(after, abs=1e-6)
    again = SentenceTransformer("encoder", device="cpu")
    minipeft.PeftModel.from_pretrained(again[0].auto_model, "adapted")
    assert again.encode(texts) == pytest.approx(after, abs=1e-6)
    again[0].auto_model.merge_and_unload()
    again.save_pretrained("merged-too")
    assert SentenceTransformer("merged-too", device="cpu").encode(texts) == pytest.approx(after, abs=1e-5)

    run_block("sentence-transformers", {})
    assert not Path("merged-encoder/adapter_config.json").exists()
    assert SentenceTransformer("merged-encoder", device="cpu").encode(texts) == pytest.approx(plain, abs=1e-5)


def test_a_pipeline_says_what_the_model_says_as_object_and_from_our_folders(folder: Path) -> None:
    model = minipeft.PeftModel.from_pretrained(base(), "run/adapter")
    tokenizer = AutoTokenizer.from_pretrained("base")
    session = run_block("transformers' pipeline and server", {"model": model, "AutoTokenizer": AutoTokenizer})
    chat = [{"role": "user", "content": "Who are you?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    reference = peft.PeftModel.from_pretrained(base(), "run/adapter")
    new = reference.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert session["said"][0]["generated_text"][-1]["content"] == tokenizer.decode(new, skip_special_tokens=True)

    told = {"max_new_tokens": 8, "do_sample": False}
    expected = pipeline("text-generation", model=model, tokenizer=tokenizer)("Hello", **told)
    assert pipeline("text-generation", model="run/adapter", tokenizer=tokenizer)("Hello", **told) == expected
    assert pipeline("text-generation", model="merged")("Hello", **told) == expected
    assert pipeline("text-generation", model="base")("Hello", **told) != expected


@contextlib.contextmanager
def serving(folder: str) -> Iterator[str]:
    """The address of a `transformers serve` of one model, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    command = [sys.executable, "-c", start, "serve", folder, "--device", "cpu", "--host", "127.0.0.1"]
    server = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(300):
            assert server.poll() is None, "the server ended"
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
                break
            time.sleep(0.2)
        yield f"{address}/v1"
    finally:
        server.terminate()
        server.wait()


def test_transformers_serve_answers_from_the_merged_folder(folder: Path) -> None:
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason=f"transformers serve needs {package}, which is not installed")
    chat = [{"role": "user", "content": "Who are you?"}]
    body = {"model": "merged", "messages": chat, "max_tokens": 8, "temperature": 0.0, "stream": False}
    with serving("merged") as address:
        request = urllib.request.Request(
            f"{address}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            said = json.load(answer)["choices"][0]["message"]["content"]
    tokenizer = AutoTokenizer.from_pretrained("base")
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = minipeft.PeftModel.from_pretrained(base(), "run/adapter")
    new = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert said == tokenizer.decode(new, skip_special_tokens=True)
