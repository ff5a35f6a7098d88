import json

import pytest

TEXTS = [
    "a film that is good and long",
    "a bad film",
    "dull",
    "the plot is thin but the actors are good",
    "good",
    "nobody should see this",
]


@pytest.fixture(scope="session")
def model_and_data(tmp_path_factory):
    import tokenizers
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("benchmark")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([*TEXTS, "Review: Sentiment: Positive Negative"], 300, special_tokens=["</s>"])
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="</s>").save_pretrained(
        folder / "model"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    (folder / "mr").mkdir()
    for split in ("train", "validation"):
        rows = [json.dumps({"text": text, "label": i % 2}) for i, text in enumerate(TEXTS)]
        (folder / "mr" / f"{split}.jsonl").write_text("\n".join(rows))
    return folder
