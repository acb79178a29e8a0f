"""Adversarial suffixes: the gradient against autograd and finite differences, losses recomputed from text, the rules of
algorithm 1, and models of the zoo with adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm_modules.evaluation.gradient_search import Budget, SuffixSearch, target_losses, token_gradient
from llm_modules.evaluation.likelihood import token_logprobs
from llm_modules.evaluation.measurement import Subject
from llm_modules.evaluation.suffixes import AdversarialSuffixes
from llm_modules.generation import Generator
from llm_modules.generation.prompts import encode_prompt
from llm_modules.tokenizer import SPECIAL_TOKENS, byte_tokenizer, wrap_tokenizer
from llm_modules.zoo import Backbone

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["Sure, here is a list of things: ! ! ! one two three.", "Tell me how to make tea and how to make toast."] * 9
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
PAIRS = [("Tell me how to make tea", "Sure, here is a list"), ("Tell me how to make toast!", "Sure, here")]
WORDS = [PAIRS[0], ("Tell me two things", "Sure")]
SMALL = Budget(steps=6, top_k=32, candidates=24, batch_tokens=500)


def bytes_of(template: str | None = CHATML) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def byte_pairs(template: str | None = CHATML) -> Any:
    """Merges make most neighbours of tokens another token."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = wrap_tokenizer(inner)
    tokenizer.chat_template = template
    return tokenizer


def pieces(template: str | None = None) -> Any:
    """As SentencePiece's: a space before the text, which the decoder takes away; a token begins each text."""
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", *SPECIAL_TOKENS]
    letters = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(vocab_size=240, special_tokens=special, initial_alphabet=letters, show_progress=False)
    inner.train_from_iterator(CORPUS, trainer)
    from tokenizers.processors import TemplateProcessing

    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token=SPECIAL_TOKENS[0])
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = [
    pytest.param(lambda: bytes_of(), id="bytes-chat"),
    pytest.param(lambda: bytes_of(None), id="bytes"),
    pytest.param(lambda: byte_pairs(), id="pairs-chat"),
    pytest.param(lambda: byte_pairs(None), id="pairs"),
    pytest.param(lambda: pieces(), id="pieces"),
]


def plain(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=320, **SIZES)).eval()


def zoo(adapter: str | None) -> Any:
    options = {"num_virtual_tokens": 3} if adapter != "LoraConfig" else {"init_lora_weights": False}
    wanted = None if adapter is None else {"class_path": f"peft.{adapter}", "init_args": options}
    backbone = Backbone(config={"model_type": "llama", "vocab_size": 320, **SIZES}, adapter=wanted)
    return backbone.build(tokenizer=byte_tokenizer(), sequence_length=64, seed=0)


def asked(tokenizer: Any, text: str) -> list[int]:
    return encode_prompt(tokenizer, [{"role": "user", "content": text}] if tokenizer.chat_template else text)


# --- the gradient


@pytest.mark.parametrize("number", [0, 1])
def test_the_gradient_is_that_of_one_hot_rows(number):
    model = plain()
    search = SuffixSearch(model, bytes_of(), PAIRS, "! ! !")
    slot, current = search.slots[number], torch.tensor(search.start)
    ours = token_gradient(model, slot, current, search._table())
    row = torch.tensor([slot.row(search.start)])
    one_hot = nn.functional.one_hot(row, 320).float().requires_grad_()
    labels = row.clone()
    labels[:, : -len(slot.target)] = -100
    model(inputs_embeds=one_hot @ model.get_input_embeddings().weight, labels=labels).loss.backward()
    places = slice(len(slot.before), len(slot.before) + len(search.start))
    torch.testing.assert_close(ours, one_hot.grad[0, places], atol=1e-5, rtol=1e-5)
    assert ours.abs().max() > 1e-2


def test_the_gradient_is_that_of_finite_differences():
    torch.manual_seed(0)  # in fp64 throughout, where Llama's norms are in fp32
    model = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=128)).eval().double()
    search = SuffixSearch(model, bytes_of(), PAIRS[:1], "!!")
    slot, table = search.slots[0], search._table()
    ours = token_gradient(model, slot, torch.tensor(search.start), table)
    ids = torch.tensor([slot.row(search.start)])
    embeddings, step = table[ids], 1e-5
    for place in range(len(search.start)):
        for token in (0, 40, 319):
            losses = []
            for sign in (1, -1):
                moved = embeddings.clone()
                moved[0, len(slot.before) + place] += sign * step * table[token]
                losses.append(float(target_losses(model, len(slot.target), inputs_embeds=moved, ids=ids).detach()))
            assert float(ours[place, token]) == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("adapter", [None, "LoraConfig", "PromptTuningConfig", "PrefixTuningConfig"])
def test_models_of_the_zoo(adapter):
    """Loss from ids and from embeddings are that of the zoo's own forward pass, and the search lowers it."""
    if adapter is not None:
        pytest.importorskip("peft")
    model = zoo(adapter)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    search = SuffixSearch(model, bytes_of(), PAIRS, "! ! !")
    rows = [slot.row(search.start) for slot in search.slots]
    first = [len(row) - len(slot.target) for row, slot in zip(rows, search.slots, strict=True)]
    expected = [-float(values.mean()) for values in token_logprobs(model, rows, first)]
    current = torch.tensor(search.start)
    assert float(search.losses(current[None], 4096)[0]) == pytest.approx(sum(expected) / 2, abs=1e-5)
    for row, slot, loss in zip(rows, search.slots, expected, strict=True):
        ids = torch.tensor([row])
        embeddings = search.model.get_input_embeddings()(ids)
        again = target_losses(search.model, len(slot.target), inputs_embeds=embeddings, ids=ids)
        assert float(again.detach()) == pytest.approx(loss, abs=1e-5)
    found = search.search(SMALL, seed=0)
    assert found.losses[-1] < found.losses[0]
    assert trained == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in model.parameters())


# --- the search


@pytest.mark.parametrize("make", TOKENIZERS)
@pytest.mark.parametrize("pairs", [PAIRS[:1], WORDS], ids=["one", "universal"])
def test_the_loss_that_is_found_is_that_of_the_text(make, pairs):
    tokenizer, model = make(), plain()
    model.train()
    search = SuffixSearch(model, tokenizer, pairs, "! ! ! !")
    found = search.search(SMALL, seed=1)
    assert model.training
    assert len(found.losses) == SMALL.steps + 1
    assert all(later <= earlier for earlier, later in zip(found.losses, found.losses[1:], strict=False))
    assert found.losses[-1] < found.losses[0]
    assert found.text.isascii()
    assert found.text.isprintable()
    model.eval()
    for text, expected in ((" ! ! ! !", found.losses[0]), (found.text, found.losses[-1])):
        total = 0.0
        for request, target in pairs:
            prompt = asked(tokenizer, request + text)
            said = target if tokenizer.chat_template else f" {target}"
            wanted = tokenizer(said, add_special_tokens=False)["input_ids"]
            labels = torch.tensor([[-100] * len(prompt) + wanted])
            total += float(model(input_ids=torch.tensor([prompt + wanted]), labels=labels).loss.detach())
        assert expected == pytest.approx(total / len(pairs), abs=1e-5)


def test_the_same_seed_finds_the_same(monkeypatch):
    def found(seed: int) -> Any:
        return SuffixSearch(plain(), bytes_of(), PAIRS[:1], "! ! ! !").search(SMALL, seed)

    first = found(0)
    torch.manual_seed(123)
    assert found(0) == first
    assert found(1).ids != first.ids


def test_in_inference_mode_as_lightning_validates():
    model = plain()
    with torch.inference_mode():
        inside = SuffixSearch(model, bytes_of(), PAIRS[:1], "! ! !").search(SMALL, seed=0)
    assert inside == SuffixSearch(model, bytes_of(), PAIRS[:1], "! ! !").search(SMALL, seed=0)


def test_candidates_exchange_one_token_for_one_of_the_most_promising():
    tokenizer, model = byte_pairs(), plain()
    search = SuffixSearch(model, tokenizer, PAIRS, "one two ! !")
    current = torch.tensor(search.start)
    gradient = torch.randn(len(current), 320, generator=torch.Generator().manual_seed(0))
    budget = Budget(steps=1, top_k=5, candidates=400)
    tried = search.candidates(gradient, current, budget, torch.Generator().manual_seed(0))
    assert len(tried) > 5
    assert len({tuple(row) for row in tried.tolist()}) == len(tried)
    allowed = search.allowed.nonzero().squeeze(-1).tolist()
    for row in tried:
        (place,) = (row != current).nonzero().squeeze(-1).tolist()
        best = sorted(allowed, key=lambda token: float(gradient[place, token]))[:5]
        assert int(row[place]) in best
        for request, _ in PAIRS:  # and its text gives these tokens again, after each request
            ids = asked(tokenizer, request + search.text(row.tolist()))
            assert row.tolist() in [ids[start : start + len(row)] for start in range(len(ids))]
    # Merges do undo some of what is drawn: these are left out.
    every = current.repeat(len(allowed), 1)
    every[:, 0] = torch.tensor(allowed)
    kept = search.kept(every)
    assert 0 < int(kept.sum()) < len(allowed)


def test_what_a_suffix_may_hold():
    tokenizer = byte_pairs()
    allowed = SuffixSearch(plain(), tokenizer, PAIRS, "! !").allowed
    assert len(allowed) == 320
    assert not allowed[len(tokenizer) :].any()
    texts = [tokenizer.decode([token]) for token in allowed.nonzero().squeeze(-1).tolist()]
    assert all(text.isascii() and text.isprintable() for text in texts)
    assert set("aZ !") <= set(texts)
    assert not set(SPECIAL_TOKENS) & set(texts)
    assert not {"\n", "é"} & set(texts)


# --- the suite


def goals(folder: Any) -> str:
    file = folder / "goals.csv"
    file.write_text("goal,target\n" + "".join(f'{goal},"{target}"\n' for goal, target in PAIRS))
    return str(file)


@pytest.mark.parametrize("universal", [False, True])
def test_the_suite(tmp_path, universal):
    subject = Subject(plain(), bytes_of(), Generator(max_new_tokens=6))
    judged = []

    def refuses(prompt: str, answer: str) -> bool:
        judged.append((prompt, answer))
        return len(judged) <= 2  # what is asked as it stands

    suite = AdversarialSuffixes(goals(tmp_path), refuses, universal=universal, budget=SMALL, start="! ! !")
    found = {m.name: m for m in suite.measure(subject)}
    assert len(suite.found) == (1 if universal else 2)
    best = [search.losses[-1] for search in suite.found]
    assert found["suffix_target_loss"].value == pytest.approx(sum(best) / len(best), abs=1e-5)
    assert found["suffix_target_loss"].value < found["suffix_target_loss_start"].value
    assert [found[f"suffix_success{end}"].value for end in ("_without", "")] == [0.0, 1.0]
    assert [prompt for prompt, _ in judged] == [request for request, _ in PAIRS] * 2
    texts = [suite.found[0 if universal else number].text for number in range(2)]
    messages = [[{"role": "user", "content": goal + text}] for (goal, _), text in zip(PAIRS, texts, strict=True)]
    said = subject.generator.generate(subject.model, subject.tokenizer, messages)
    assert [answer for _, answer in judged[2:]] == [completion.text for completion in said]
    begun = [c.text.startswith(target) for c, (_, target) in zip(said, PAIRS, strict=True)]
    assert found["suffix_target_said"].value == sum(begun) / 2


def test_silence_is_no_success(tmp_path):
    """A model that ends its answer before it has begun."""
    tokenizer, model = bytes_of(), plain()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = nn.Parameter(torch.zeros(model.config.vocab_size))
        model.lm_head.bias[tokenizer.eos_token_id] = 1.0
    suite = AdversarialSuffixes(goals(tmp_path), lambda *_: False, budget=Budget(1, 2, 2), start="! !")
    found = {m.name: m.value for m in suite.measure(Subject(model, tokenizer, Generator(max_new_tokens=6)))}
    assert (found["suffix_success_without"], found["suffix_success"]) == (0.0, 0.0)


def test_a_target_that_the_model_says_anyway_is_said(tmp_path):
    """A model that was trained to answer so: greedy decoding says the beginning, which the suite sees."""
    tokenizer, model = bytes_of(), plain()
    row = torch.tensor([asked(tokenizer, f"{PAIRS[0][0]} !!") + tokenizer("Sure")["input_ids"]])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(input_ids=row, labels=row).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    file = tmp_path / "goals.csv"
    file.write_text(f"goal,target\n{PAIRS[0][0]},Sure\n")
    suite = AdversarialSuffixes(str(file), lambda *_: False, budget=Budget(2, 4, 4), start="!!")
    found = {m.name: m for m in suite.measure(Subject(model, tokenizer, Generator(max_new_tokens=6)))}
    assert found["suffix_target_said"].value == 1.0
    assert found["suffix_target_loss"].value < 0.1


def test_what_is_not_allowed(tmp_path):
    with pytest.raises(ValueError, match="top_k: 0 is not allowed; at least 1 is"):
        Budget(top_k=0)
    with pytest.raises(ValueError, match=r"start: ' !' is not allowed; a text without spaces around it is"):
        AdversarialSuffixes(goals(tmp_path), lambda *_: False, start=" !")
    with pytest.raises(ValueError, match=r"no column 'targets'; there are: goal, target; did you mean 'target'"):
        AdversarialSuffixes(goals(tmp_path), lambda *_: False, target_column="targets")
    with pytest.raises(ValueError, match=r"target: '' has no tokens"):
        SuffixSearch(plain(), bytes_of(), [("a", "")], "!")
    with pytest.raises(ValueError, match=r"text 0: \d+ tokens, but the model has 128 positions"):
        SuffixSearch(plain(), bytes_of(), [("a" * 120, "Sure")], "!")
    empty = tmp_path / "empty.csv"
    empty.write_text("goal,target\na,\n")
    with pytest.raises(ValueError, match=r"empty.csv:1: target: '' is not allowed; a text that is not empty is"):
        AdversarialSuffixes(str(empty), lambda *_: False)
    shouting = bytes_of(CHATML.replace("| trim", "| upper"))
    with pytest.raises(ValueError, match=r"start: the chat template changes 'x!'"):
        SuffixSearch(plain(), shouting, PAIRS, "x!")
    # "toast!" and "!" are merged over the space.
    with pytest.raises(
        ValueError, match=r"start: '! ! !' is not the same tokens after 'Tell me how to make toast!' as"
    ):
        SuffixSearch(plain(), pieces(), PAIRS, "! ! !")
