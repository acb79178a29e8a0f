"""Assistant masks found by rendering, against transformers' generation tags and against the known answers."""

from __future__ import annotations

import random
import re

import pytest

from llm_modules.data.chat import Conversation
from llm_modules.data.conversation_encoding import ConversationEncoder
from llm_modules.data.masks import TemplateError, assistant_spans, renderer
from llm_modules.data.sources import Row
from llm_modules.data.templates import TEMPLATES
from llm_modules.tokenizer import SPECIAL_TOKENS, byte_tokenizer, wrap_tokenizer

FOR = "{%- for message in messages %}"
END = "{%- endfor %}"
GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")

# Further templates, each with the tags that say what the assistant wrote.
TAGGED = dict(TEMPLATES) | {
    # [INST] blocks; no generation prompt; content stripped (Llama 2).
    "llama2": FOR + "{%- if message.role == 'user' %}{{- bos_token + '[INST] ' + message.content | trim + ' [/INST]' }}"
    "{%- elif message.role == 'assistant' %}"
    "{% generation %}{{- ' ' + message.content | trim + ' ' + eos_token }}{% endgeneration %}"
    "{%- else %}{{- '<<SYS>>' + message.content + '<</SYS>>' }}{%- endif %}" + END,
    # The system message is written before the last user turn, so that earlier prompts look different (Mistral v0.3).
    "mistral": "{%- set ns = namespace(system='', last=0) %}"
    "{%- for message in messages %}{%- if message.role == 'system' %}{%- set ns.system = message.content %}{%- endif %}"
    "{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{{- bos_token }}" + FOR + "{%- if message.role == 'user' %}"
    "{{- '[INST] ' + (ns.system + '\n\n' if ns.system and loop.index0 == ns.last else '') }}"
    "{{- message.content + '[/INST]' }}"
    "{%- elif message.role == 'assistant' %}"
    "{{- ' ' }}{% generation %}{{- message.content + eos_token }}{% endgeneration %}"
    "{%- elif message.role == 'tool' %}{{- '[TOOL_RESULTS] ' + message.content + '[/TOOL_RESULTS]' }}{%- endif %}"
    + END,
    # An empty thought in answers after the last question, none in earlier ones (Qwen3).
    "qwen3": "{%- set ns = namespace(last=0) %}{%- for message in messages %}"
    "{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    + FOR
    + "{%- if message.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}{% generation %}"
    "{%- if loop.index0 > ns.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{{- message.content + '<|im_end|>' }}{% endgeneration %}{{- '\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}"
    + END
    + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}",
    # ChatML that ignores add_generation_prompt: the header must not be trained.
    "chatml without generation prompt": FOR + "{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' %}{% generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}"
    "{%- else %}{{- message.content + '<|im_end|>' }}{%- endif %}{{- '\n' }}" + END,
    # Names of its own, and turns that end in words.
    "plain": FOR + "{%- if message.role == 'assistant' %}{{- 'Bot: ' }}"
    "{% generation %}{{- message.content + ' (over)\n' }}{% endgeneration %}"
    "{%- else %}{{- message.role + ': ' + message.content + '\n' }}{%- endif %}"
    + END
    + "{%- if add_generation_prompt %}{{- 'Bot: ' }}{%- endif %}",
}

WORDS = [
    "over",
    "user",
    " assistant",
    "\n",
    "<|im",
    "_end|>",
    "é",
    "日本",
    "the answer",
    " ",
    "{{ x }}",
    "Bot:",
    "[INST]",
]


def talk(rng: random.Random, *, system: bool, tools: bool) -> list[dict]:
    def text() -> str:
        # A letter at each end, so that templates that strip and ones that do not are the same question; see below.
        return "a" + "".join(rng.choice(WORDS) for _ in range(rng.randint(0, 6))) + "b"

    messages = [{"role": "system", "content": text()}] if system else []
    for _ in range(rng.randint(1, 4)):
        messages.append({"role": "user", "content": text()})
        messages.append({"role": "assistant", "content": text()})
        if tools and rng.random() < 0.5:
            messages.append({"role": "tool", "content": text()})
            messages.append({"role": "assistant", "content": text()})
    return messages


@pytest.fixture(scope="module")
def merging_tokenizer():
    """A tokenizer whose tokens run over spaces and line ends, as real ones do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["assistant\nuser\n\n the answer over ab", "user: a\n\nassistant: b"] * 20, trainer)
    wrapped = wrap_tokenizer(tokenizer)
    wrapped.add_tokens(["<end_of_turn>", "<|eot_id|>"], special_tokens=True)
    return wrapped


@pytest.mark.parametrize("name", TAGGED)
def test_masks_equal_those_of_generation_tags(name, merging_tokenizer):
    rng = random.Random(name)
    merging_tokenizer.chat_template = GENERATION.sub("", TAGGED[name])
    encoder = ConversationEncoder(merging_tokenizer)
    assert "generation %}" not in merging_tokenizer.chat_template
    for number in range(60):
        messages = talk(rng, system=number % 2 == 0, tools=number % 3 == 0)
        expected = merging_tokenizer.apply_chat_template(
            messages, chat_template=TAGGED[name], return_dict=True, return_assistant_tokens_mask=True
        )
        found = encoder([Row({"messages": messages}, "file", number)])
        assert found.tokens.tolist() == expected["input_ids"]
        assert found.trained.astype(int).tolist() == expected["assistant_masks"], messages


@pytest.mark.parametrize("name", TEMPLATES)
def test_shipped_templates_use_their_own_tags(name, merging_tokenizer):
    rng = random.Random(name)
    merging_tokenizer.chat_template = TEMPLATES[name]
    encoder = ConversationEncoder(merging_tokenizer)
    for number in range(20):
        messages = talk(rng, system=number % 2 == 0, tools=number % 3 == 0)
        expected = merging_tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        found = encoder([Row({"messages": messages}, "file", number)])
        assert found.trained.astype(int).tolist() == expected["assistant_masks"]


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("chatml", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
        ("gemma", "<end_of_turn>"),
        ("zephyr", "<|endoftext|>"),
        ("alpaca", "<|endoftext|>"),
        ("raw", "<|endoftext|>"),
    ],
)
@pytest.mark.parametrize("tags", [True, False])
def test_what_is_trained_is_the_answers_and_their_ends(name, end, tags):
    """With a token for each byte, the trained text can be written down."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL_TOKENS[2:], "<|eot_id|>", "<end_of_turn>"]})
    tokenizer.chat_template = TEMPLATES[name] if tags else GENERATION.sub("", TEMPLATES[name])
    encoder = ConversationEncoder(tokenizer)
    rng = random.Random(name)
    for number in range(40):
        messages = talk(rng, system=number % 2 == 0, tools=number % 3 == 0)
        found = encoder([Row({"messages": messages}, "file", number)])
        text = tokenizer.decode(found.tokens[found.trained].tolist())
        assert text == "".join(m["content"] + end for m in messages if m["role"] == "assistant")
        assert found.counts["turns without end"] == 0


def test_white_space_around_an_answer_is_the_templates_business():
    tokenizer = byte_tokenizer()
    messages = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "\n  yes \n"}]
    for name, expected in {"chatml": "\n  yes \n<|im_end|>", "llama3": "yes<|eot_id|>"}.items():
        for template in (TEMPLATES[name], GENERATION.sub("", TEMPLATES[name])):
            tokenizer.chat_template = template
            found = ConversationEncoder(tokenizer)([Row({"messages": messages}, "file", 1)])
            assert tokenizer.decode(found.tokens[found.trained].tolist()) == expected


def test_a_template_that_hides_the_answer_is_refused():
    tokenizer = byte_tokenizer()
    conversation = Conversation(
        [
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": "answer"},
            {"role": "user", "content": "more"},
            {"role": "assistant", "content": "again"},
        ]
    )
    broken = {
        "drops earlier answers": FOR
        + "{%- if loop.last or message.role == 'user' %}{{- message.content + '<|im_end|>' }}"
        "{%- endif %}" + END,
        "turns the order round": "{%- for message in messages | reverse %}{{- message.role + ':' + message.content }}"
        + END,
        "writes answers in capitals": FOR + "{{- message.role + message.content | upper }}" + END,
    }
    for template in broken.values():
        tokenizer.chat_template = template
        with pytest.raises(TemplateError, match="chat template"):
            assistant_spans(renderer(tokenizer), conversation, SPECIAL_TOKENS)


def test_a_template_that_raises_names_the_row():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        FOR + "{%- if message.role == 'system' %}{{ raise_exception('System role not supported') }}{%- endif %}"
        "{{- message.content }}" + END
    )
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    with pytest.raises(ValueError, match=r"^chats\.jsonl:7: the chat template refuses .*System role not supported$"):
        ConversationEncoder(tokenizer)([Row({"messages": messages}, "chats.jsonl", 7)])


CALLS = [
    {"role": "user", "content": "How warm is it in Oslo?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}],
    },
    {"role": "tool", "content": "3 degrees"},
    {"role": "assistant", "content": "It is 3 degrees."},
]


@pytest.mark.parametrize("template", [*sorted(TEMPLATES), "untagged"])
def test_a_template_that_leaves_out_tool_calls_is_refused(template):
    tokenizer = byte_tokenizer()
    untagged = FOR + "{{- message.role + ': ' + message.content + '<|im_end|>' }}" + END
    tokenizer.chat_template = TEMPLATES.get(template, untagged)
    row = Row({"messages": CALLS}, "calls.jsonl", 7)
    if template == "chatml":
        found = ConversationEncoder(tokenizer)([row])
        assert "get_weather" in tokenizer.decode(found.tokens[found.trained].tolist())
        return
    with pytest.raises(ValueError, match=r"^calls\.jsonl:7: the chat template leaves out message 2's .*get_weather"):
        ConversationEncoder(tokenizer)([row])


def test_train_on():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES["chatml"]
    messages = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "second"},
    ]
    row = Row({"messages": messages}, "file", 1)
    last = ConversationEncoder(tokenizer, train_on="last")([row])
    assert tokenizer.decode(last.tokens[last.trained].tolist()) == "second<|im_end|>"
    every = ConversationEncoder(tokenizer, train_on="all")([row])
    assert every.trained.all()


PIECES = (
    FOR + "{{- '<|im_start|>' + message.role + '\n' }}{%- if message.role == 'assistant' %}"
    "{%- if message.thought %}{% generation %}{{- '<think>' + message.thought + '</think>' }}{% endgeneration %}"
    "{%- endif %}{% generation %}{{- message.content }}{% endgeneration %}{{- ' ' }}"
    "{% generation %}{{- '<|im_end|>' }}{% endgeneration %}{{- '\n' }}"
    "{%- else %}{{- message.content + '<|im_end|>\n' }}{%- endif %}" + END
)
PROMPT = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("prompt", [PROMPT, PROMPT.replace("\n'", "\n<think>'"), ""])
def test_the_last_turn_is_all_that_a_template_marks_of_it(turns, prompt):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = PIECES + prompt
    asked, said = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "four", "thought": "easy"}
    row = Row({"messages": [asked, said] * turns}, "file", 1)
    whole = "<think>easy</think>four<|im_end|>"
    for train_on, times in (("last", 1), ("assistant", turns)):
        found = ConversationEncoder(tokenizer, train_on=train_on)([row])
        assert tokenizer.decode(found.tokens[found.trained].tolist()) == whole * times


def test_pieces_of_which_turn_cannot_be_told_are_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{- messages | length }}" + PIECES + PROMPT
    asked, said = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "four"}
    row = Row({"messages": [asked, said] * 2}, "chats.jsonl", 7)
    assert ConversationEncoder(tokenizer)([row]).trained.any()
    with pytest.raises(ValueError, match=r"^chats\.jsonl:7: the chat template marks an answer in several pieces, and"):
        ConversationEncoder(tokenizer, train_on="last")([row])
    tokenizer.chat_template = "{{- messages | length }}" + TEMPLATES["chatml"]
    found = ConversationEncoder(tokenizer, train_on="last")([row])  # one for each turn: the last is the last one's
    assert tokenizer.decode(found.tokens[found.trained].tolist()) == "four<|im_end|>"


def test_masks_equal_trl_on_its_own_training_template():
    trl = pytest.importorskip("trl")
    templates = pytest.importorskip("trl.chat_template_utils")
    template = getattr(templates, "qwen3_training_chat_template", None)
    if template is None:
        pytest.skip(f"trl {trl.__version__} has no training template for Qwen3")
    tokenizer = byte_tokenizer()
    rng = random.Random(5)
    for number in range(30):
        messages = talk(rng, system=number % 2 == 0, tools=False)
        tokenizer.chat_template = template
        expected = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert any(expected["assistant_masks"])
        tokenizer.chat_template = GENERATION.sub("", template)
        found = ConversationEncoder(tokenizer)([Row({"messages": messages}, "file", number)])
        assert found.tokens.tolist() == expected["input_ids"]
        # White space after the end of the turn, which the model never writes, may be trained by the one or the other.
        pairs = zip(expected["input_ids"], found.trained, expected["assistant_masks"], strict=True)
        assert all(tokenizer.decode([token]).isspace() for token, ours, theirs in pairs if ours != theirs)
