import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from longvlm.pipeline.judging.judge_local import LocalChatModel
from longvlm.pipeline.judging.judges import Case, ChatJudge
from longvlm.schemas.errors import ErrorCode, InputError, TerminalError
from models import byte_tokenizer, save_clip_tower

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}assistant: "
)
QUESTION = {"question": "What?", "question2": None, "answer": "a dog", "type": "text", "choices": None, "schema": None}


def save_judge(folder, template=TEMPLATE):
    tokenizer = byte_tokenizer(start="<s>", end="</s>", max_length=4096, lower=False, close=False)
    tokenizer.chat_template = template
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=4096, **sizes, **ids)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_judge(tmp_path_factory.mktemp("judges") / "small-judge")


def test_a_folder_replies_the_same_each_time_and_its_random_words_are_unparsed(folder):
    chat = LocalChatModel(folder)
    assert chat.name.startswith("local:small-judge@")
    assert chat.reply([{"role": "user", "content": "hello"}]) == LocalChatModel(folder).reply(
        [{"role": "user", "content": "hello"}]
    )
    verdict = ChatJudge(chat).judge(Case("qa", QUESTION, ("dog",)))
    assert (verdict.status, verdict.error_code) == ("unparsed", None)
    assert verdict.raw_reply is not None


def test_what_the_judge_cannot_take_fails_alone(folder):
    chat = LocalChatModel(folder)
    with pytest.raises(TerminalError, match="do not fit the judge's 4096 of context") as failed:
        chat.reply([{"role": "user", "content": "x" * 5000}])
    assert failed.value.code == ErrorCode.JUDGE_FAILED
    with pytest.raises(TerminalError, match="refuses: no tools"):
        chat.reply([{"role": "tool", "content": "x"}])


def test_what_is_no_judge_is_told(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        LocalChatModel(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="has no chat template"):
        LocalChatModel(save_judge(tmp_path / "base", template=None))
    with pytest.raises(InputError, match=r"the judge .*bomb cannot be filled \(it takes more than 512 MB"):
        LocalChatModel(save_judge(tmp_path / "bomb", template="{{ 'a' * 10 ** 12 }}"))
    save_clip_tower(tmp_path / "tower")
    with pytest.raises(InputError, match="has no chat template"):
        LocalChatModel(str(tmp_path / "tower"))
