"""Stop strings, streaming, end tokens, prompts and settings, on a model whose text is known beforehand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llm_modules.generation import Generator, PromptTooLong
from llm_modules.generation.completion import Detokenizer, cut
from llm_modules.generation.prompts import end_token_ids, turn_end_token
from llm_modules.tokenizer import byte_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END, PAD, IM_START, IM_END = 256, 257, 258, 259


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def say(tokenizer):
    """Makes a Llama that says given ids (or text) after any prompt of ``prompt`` tokens, then end tokens."""

    def make(answer, prompt=1, positions=64):
        ids = tokenizer(answer)["input_ids"] if isinstance(answer, str) else list(answer)
        config = LlamaConfig(
            vocab_size=260,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=positions,
        )
        model = LlamaForCausalLM(config).eval()

        class Says(nn.Module):
            """A head that looks at nothing but the position of the token."""

            def forward(self, hidden):
                logits = torch.zeros(*hidden.shape[:2], 260)
                for row, places in enumerate(model.places):
                    for column, place in enumerate(places.tolist()):
                        step = place - prompt + 1
                        logits[row, column, ids[step] if 0 <= step < len(ids) else END] = 10.0
                return logits

        def remember(module, args, kwargs):
            model.places = kwargs["position_ids"][:, -kwargs.get("logits_to_keep", 1) :]
            model.places = model.places.expand(kwargs["input_ids"].shape[0], -1)

        model.register_forward_pre_hook(remember, with_kwargs=True)
        model.lm_head = Says()
        return model

    return make


def pieces_of(generator, model, tokenizer, prompt="x"):
    pieces: list[str] = []
    completion = generator.stream(model, tokenizer, prompt, pieces.append)
    assert "".join(pieces) == completion.text
    assert all(pieces)
    return completion, pieces


def test_an_answer_ends_at_the_end_token(say, tokenizer):
    (completion,) = Generator(max_new_tokens=30).generate(say("hello"), tokenizer, ["x"])
    assert (completion.text, completion.finish_reason) == ("hello", "stop")
    assert completion.token_ids == [*tokenizer("hello")["input_ids"], END]
    (completion,) = Generator(max_new_tokens=3).generate(say("hello"), tokenizer, ["x"])
    assert (completion.text, completion.finish_reason, len(completion.token_ids)) == ("hel", "length", 3)
    (completion,) = Generator(max_new_tokens=6).generate(say("hello"), tokenizer, ["x"])  # ends with the last token
    assert completion.finish_reason == "stop"


@pytest.mark.parametrize(
    ("answer", "stop", "text", "ids"),
    [
        ("one two three", [" three"], "one two", 13),
        ("one two three", ["two", "one two"], "", 7),  # the earlier place wins
        ("aab", ["ab"], "a", 3),
        ("abab", ["b"], "a", 2),
        ("naïve café", ["é"], "naïve caf", 12),  # each accented letter is two tokens of the byte tokenizer
        ("naïve café", ["ï"], "na", 4),
        ("日本語です", ["語で"], "日本", 12),
        ("日本語です", ["\n"], "日本語です", 16),
        ("👩‍💻 codes", ["💻"], "👩‍", 11),  # a stop string inside of what a reader sees as one character
    ],
)
def test_stop_strings_cut_exactly(say, tokenizer, answer, stop, text, ids):
    generator = Generator(max_new_tokens=40, stop=stop)
    (completion,) = generator.generate(say(answer), tokenizer, ["x"])
    assert (completion.text, completion.finish_reason, len(completion.token_ids)) == (text, "stop", ids)
    streamed, _ = pieces_of(generator, say(answer), tokenizer)
    assert streamed == completion
    beam = Generator(max_new_tokens=40, stop=stop, strategy="beam", num_beams=2)
    assert beam.generate(say(answer), tokenizer, ["x"])[0].text == text


def test_a_row_that_stopped_does_not_wait_for_others(say, tokenizer):
    model, steps = say("one. two. three."), []
    model.register_forward_hook(lambda *_: steps.append(1))
    Generator(max_new_tokens=40, stop=["."]).generate(model, tokenizer, ["x", "y"])
    assert len(steps) == 4


def test_a_stop_string_that_is_a_special_token(say, tokenizer):
    model = say("hi<|im_start|>there")
    (completion,) = Generator(max_new_tokens=9, stop=["<|im_start|>"]).generate(model, tokenizer, ["x"])
    assert (completion.finish_reason, completion.token_ids[-1]) == ("stop", IM_START)
    with pytest.raises(ValueError, match=r"mixes text and the special token '<\|im_start\|>'"):
        Generator(stop=["<|im_start|>user"]).generate(model, tokenizer, ["x"])


def test_streamed_text_holds_back_what_may_not_stay(say, tokenizer):
    _, pieces = pieces_of(Generator(max_new_tokens=40, stop=["abc"]), say("xabyab日"), tokenizer)
    assert pieces == ["x", "aby", "ab日"]
    _, pieces = pieces_of(Generator(max_new_tokens=2), say("日"), tokenizer)
    assert pieces == ["\ufffd"]  # cut in the middle: said at the end, as generate says it
    _, pieces = pieces_of(Generator(max_new_tokens=40, strategy="beam"), say("hello"), tokenizer)
    assert pieces == ["hello"]


def test_an_interrupt_ends_the_answer_and_keeps_what_was_said(say, tokenizer):
    model, calls = say("hello world"), []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt

    model.register_forward_hook(interrupt)
    model.train()
    completion, _ = pieces_of(Generator(max_new_tokens=40), model, tokenizer)
    assert (completion.text, completion.finish_reason) == ("hello", "interrupted")
    assert model.training


def test_an_interrupt_that_python_loses_ends_the_answer(say, tokenizer):
    """One that comes while a finalizer runs, from which no exception is handed on."""
    import os
    import signal

    class Finalized:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):  # the signal is seen in here
                pass

    pieces = []

    def write(piece):
        pieces.append(piece)
        if len("".join(pieces)) >= 5 and not hasattr(write, "sent"):
            write.sent = Finalized()
            write.sent = True

    before = signal.getsignal(signal.SIGINT)
    completion = Generator(max_new_tokens=40).stream(say("hello world, and so on"), tokenizer, "x", write)
    assert completion.finish_reason == "interrupted"
    assert completion.text == "".join(pieces)
    assert completion.text.rstrip() == "hello"
    assert signal.getsignal(signal.SIGINT) is before


def test_the_model_is_left_as_it_was(say, tokenizer):
    model = say("hello").train()
    model.model.layers[0].eval()  # a frozen part
    before, modes = model.generation_config, [module.training for module in model.modules()]
    Generator(max_new_tokens=4, cache="static").generate(model, tokenizer, ["x", "yy"])
    assert model.generation_config is before
    assert [module.training for module in model.modules()] == modes
    assert not any(hasattr(model, name) for name in ("_cache", "_static_cache"))
    model.places = None
    with pytest.raises(ValueError, match="positions"):
        Generator(max_new_tokens=60).generate(model, tokenizer, ["x" * 10])
    assert [module.training for module in model.modules()] == modes


def test_a_folders_own_generation_defaults_do_not_mix_in(say, tokenizer):
    model = say("hello")
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.max_length = 3
    model.generation_config.forced_eos_token_id = 5
    assert Generator(max_new_tokens=9).generate(model, tokenizer, ["x"])[0].text == "hello"


def test_end_tokens_of_the_chat_template_and_of_the_models_config(say, tokenizer):
    model = say("hello")
    assert model.generation_config.eos_token_id == 2  # Llama's, which is the byte '#' here
    assert end_token_ids(model, tokenizer) == [END]
    model.generation_config.eos_token_id = [2, IM_START]
    assert end_token_ids(model, tokenizer) == [END, IM_START]
    assert turn_end_token(tokenizer) is None
    tokenizer.chat_template = CHATML
    assert turn_end_token(tokenizer) == IM_END
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert turn_end_token(tokenizer) is None
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ValueError, match="the chat template refuses these messages: no"):
        turn_end_token(tokenizer)


def test_chat_prompts_go_through_the_template(say, tokenizer):
    messages = [{"role": "user", "content": "hi"}]
    model = say("hello<|im_end|>more", prompt=len("user\nhi\nassistant\n") + 3, positions=128)
    with pytest.raises(ValueError, match="prompt 0: messages need a chat template and the tokenizer has none"):
        Generator(max_new_tokens=9).generate(model, tokenizer, [messages])
    tokenizer.chat_template = CHATML
    (completion,) = Generator(max_new_tokens=9).generate(model, tokenizer, [messages])
    assert (completion.text, completion.finish_reason, completion.token_ids[-1]) == ("hello", "stop", IM_END)


def test_prompts_that_cannot_be_used(say, tokenizer):
    model = say("hello", positions=16)
    with pytest.raises(
        PromptTooLong, match=r"prompt 1: 12 tokens and max_new_tokens=5 exceed the model's 16 positions"
    ):
        Generator(max_new_tokens=5).generate(model, tokenizer, ["x", "y" * 12])
    assert Generator(max_new_tokens=5).generate(model, tokenizer, ["y" * 11])[0].truncated == 0
    (completion,) = Generator(max_new_tokens=5, too_long="truncate").generate(model, tokenizer, ["y" * 13])
    assert (completion.truncated, completion.prompt_tokens) == (2, 11)
    with pytest.raises(ValueError, match="max_new_tokens=16 leaves no room"):
        Generator(max_new_tokens=16).generate(model, tokenizer, ["x"])
    model.set_input_embeddings(nn.Embedding(100, 8))
    with pytest.raises(ValueError, match="prompt 1: token id 127 is outside the model's vocabulary of 100"):
        Generator(max_new_tokens=2).generate(model, tokenizer, ["!", "\xff"])
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="prompt 0: it is empty"):
        Generator(max_new_tokens=2).generate(model, tokenizer, [""])


def test_no_prompts_no_completions(say, tokenizer):
    assert Generator().generate(say("hello", positions=512), tokenizer, []) == []


def test_results_come_in_input_order_and_batches_are_sorted_by_length():
    generator = Generator(batch_size=2)
    assert generator.batches([3, 9, 3, 5, 9]) == [[1, 4], [3, 0], [2]]


def test_skipped_places_do_not_change_the_batches(say, tokenizer):
    generator = Generator(max_new_tokens=4, batch_size=2)
    prompts = ["a", "bbb", "cc", "dddd", "eeeee"]
    model = say("hello")
    everything = list(generator.iterate(model, tokenizer, prompts))
    assert [sorted(batch) for batch in everything] == [[3, 4], [1, 2], [0]]
    rest = list(generator.iterate(model, tokenizer, prompts, skip={3, 4, 1}))
    assert rest == everything[1:]


def test_space_after_the_prompt_survives_sentencepiece():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "▁The", "▁capital", "▁is", "▁Paris"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    assert tokenizer.decode([4]) == "Paris"
    assert Detokenizer(tokenizer, [1, 2, 3]).text([4]) == " Paris"
    assert Detokenizer(tokenizer, []).text([4]) == "Paris"


def test_cut_ignores_what_follows_the_end(tokenizer):
    alone = Detokenizer(tokenizer, [])
    assert cut([*b"AB", END, *b"CD"], alone, [END], []) == ([65, 66, END], alone.text([65, 66]), True)
    assert cut([65, -1, -1], alone, [], []) == ([65], alone.text([65]), True)
    assert cut([], alone, [END], ["x"]) == ([], "", False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "nucleus"}, "strategy='nucleus' must be greedy, sample or beam"),
        ({"temperature": 0.0, "strategy": "sample"}, "temperature=0.0 must be above 0 .*use strategy: greedy"),
        ({"temperature": 0.7}, "temperature=0.7 is read by strategy 'sample' only, not by 'greedy'"),
        ({"num_beams": 2, "strategy": "sample"}, "num_beams=2 is read by strategy 'beam' only"),
        ({"top_p": 1.5, "min_p": -1, "strategy": "sample"}, "top_p=1.5 must be .*; min_p=-1.0 must be between"),
        ({"max_new_tokens": "many"}, "max_new_tokens='many' must be of type int"),
        ({"max_new_tokens": True}, "max_new_tokens=True must be of type int"),
        ({"stop": "\n"}, "stop='.*' must be of type list"),
        ({"stop": [""]}, "stop=.* must be a list of strings, none of them empty"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ],
)
def test_wrong_settings_are_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        Generator(**settings)
    assert "\n" not in str(error.value)


def test_whole_numbers_are_floats_where_floats_are_meant():
    assert isinstance(Generator(strategy="sample", temperature=2).temperature, float)
