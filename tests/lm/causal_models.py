"""Every causal architecture of transformers as a tiny random model, and what evaluation and analysis make of it.

``python causal_models.py [NAME ...]`` prints a JSON line for each: {"name", "evaluation", "analysis"}. Each model has
its own process, with limits on time and memory. Outcomes: right, slower (prompts are read as a whole), refused: ...,
wrong: ..., crash: ..., not built: ...
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

VOCAB, WINDOW = 300, 7
CPU_SECONDS, SECONDS, MEMORY, MOST_PARAMETERS = 60, 900, 6 << 30, 20_000_000
_SIZES = {
    32: "hidden_size d_model n_embd dim hidden_dim embedding_dim embedding_size word_embed_proj_dim lru_width "
        "d_embed emb_dim attention_hidden_size embedding_hidden_size",
    48: "intermediate_size ffn_dim n_inner inner_dim d_ff decoder_ffn_dim encoder_ffn_dim d_inner "
        "feed_forward_size dff",
    16: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size q_lora_rank kv_lora_rank "
        "qk_head_dim block_size moe_shared_expert_intermediate_size",
    8: "head_dim rotary_dim d_kv qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim "
       "linear_value_head_dim mamba_head_dim mamba_n_heads mamba_d_head mamba_num_heads "
       "hidden_size_per_layer_input d_head index_topk index_head_dim",
    4: "num_hidden_layers n_layer num_layers n_layers decoder_layers num_decoder_layers num_attention_heads "
       "n_head attention_heads n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
       "num_local_experts n_routed_experts state_size mamba_d_state mamba_d_conv ssm_state_size laurel_rank "
       "time_step_rank mamba_dt_rank moe_num_experts",
    2: "num_key_value_heads num_experts_per_tok moe_topk linear_num_key_heads linear_num_value_heads "
       "n_mamba_heads mamba_expand altup_num_inputs index_n_heads pad_token_id",
    1: "encoder_layers n_group topk_group first_k_dense_replace moe_layer_start_index mamba_n_groups "
       "n_shared_experts n_groups num_shared_experts eos_token_id",
    0: "num_kv_shared_layers bos_token_id",
    256: "max_position_embeddings n_positions n_ctx max_seq_len",
    WINDOW: "sliding_window window_size attention_window attention_chunk_size attention_window_size",
    VOCAB: "vocab_size vocab_size_per_layer_input",
    3: "conv_L_cache moe_k",
}  # fmt: skip
COMMON = {name: size for size, names in _SIZES.items() for name in names.split()} | {"use_mamba_kernels": False}
_PHI3 = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [8.0, 10.0, 20.0, 40.0],
}
SPECIAL: dict[str, dict] = {
    "phi3": {
        "original_max_position_embeddings": 32,
        "rope_parameters": {**_PHI3, "original_max_position_embeddings": 32},
        "sliding_window": None,
    },
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "ernie4_5_moe": {"moe_k": 2},
}


def configuration(name, **changes):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    base = CONFIG_MAPPING[name]().get_text_config(decoder=True)
    known = base.to_dict()
    given = {key: value for key, value in COMMON.items() if key in known}
    if known.get("layer_types"):  # every kind of layer
        given["layer_types"] = (list(dict.fromkeys(known["layer_types"])) * 4)[: changes.get("num_hidden_layers", 4)]
    if "kv_lora_rank" in known:
        given["num_key_value_heads"] = given["num_attention_heads"]
    given |= SPECIAL.get(name, {})
    return type(base)(**{**given, **changes})


def tiny(name, **changes):
    """A random model, in its own choice of attention. Raises ValueError where it is not small."""
    import torch
    import transformers

    config = configuration(name, **changes)
    with torch.device("meta"):
        size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.numel():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


class Tokenizer:
    """Words to numbers."""

    eos_token_id, model_max_length = 1, 256

    def __call__(self, texts, add_special_tokens=True):
        given = [texts] if isinstance(texts, str) else texts
        ids = [[20 + sum(word.encode()) % 250 for word in text.split()] for text in given]
        return type("Encoding", (), {"input_ids": ids[0] if isinstance(texts, str) else ids})

    def decode(self, ids, **options):
        return " ".join(map(str, ids))


def scores_apart(lm, plain, prefix_length, lengths=(6, 1, 4)):
    """The largest difference of log-probabilities after a shared prefix from those of whole prompts, each alone;
    plain(ids) -> logits.
    """
    import torch

    generator = torch.Generator().manual_seed(1)
    prefix = torch.randint(3, VOCAB, (prefix_length,), generator=generator)
    rows = [torch.randint(3, VOCAB, (n,), generator=generator) for n in lengths]
    tokens, padding = torch.full((len(rows), max(lengths)), 2), torch.ones(len(rows), max(lengths), dtype=torch.bool)
    wanted, expected = [], []
    for i, row in enumerate(rows):
        tokens[i, : len(row)], padding[i, : len(row)] = row, False
        with torch.no_grad():
            whole = plain(torch.cat([prefix, row])[None]).float().log_softmax(-1)
        for position, target in ((0, 5), (len(row) - 1, 7), (len(row) - 1, 250)):
            wanted.append((i, position, target))
            expected.append(whole[prefix_length + position, target])
    found, _ = lm.log_probs(tokens, padding, *torch.tensor(wanted).unbind(1), lm.start(prefix.tolist()))
    return (found - torch.stack(expected)).abs().max().item()


def evaluation(model, name):
    """(outcome, HuggingFaceLM or None)."""
    from momentum_lm.errors import UserError
    from momentum_lm.lm.huggingface import HuggingFaceLM
    from momentum_lm.lm.verification import reset_rotary

    implementation = model.config._attn_implementation
    try:
        lm = HuggingFaceLM(model, Tokenizer(), name, "0")
    except UserError as error:
        return f"refused: {error}", None

    def plain(ids):
        changed = lm.model.config._attn_implementation
        lm.model.set_attn_implementation(implementation)
        reset_rotary(lm.model)
        try:
            return lm.model(ids, use_cache=False).logits[0]
        finally:
            lm.model.set_attn_implementation(changed)

    worst = max(scores_apart(lm, plain, length) for length in (1, 11, 30))
    return (f"wrong: {worst:.1e}" if not worst < 1e-3 else "right" if lm.shares_prefixes else "slower"), lm


def attention_apart(lm):
    """The largest difference of traced attention and outputs from those that the model itself gives."""
    import torch

    from momentum_lm.lm.attention_interface import attention_modules
    from momentum_lm.lm.tracing import AttentionTrace, tracing

    tokens = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(3))
    positions = torch.tensor([[23, 22], [12, 5]])
    before = lm.model.config._attn_implementation
    outputs: list = []  # of each call: some models run a layer several times
    trace = AttentionTrace(positions, True, True)

    def keep(module, given, result):
        outputs.append(result[0] if isinstance(result, tuple) else result)

    with torch.no_grad():
        plain = lm.model(tokens, use_cache=False).logits
        with tracing(lm.model, trace):
            traced = lm.model(tokens, use_cache=False).logits
        worst = (plain - traced).abs().max().item()
        try:
            lm.model.set_attn_implementation("eager")
            handles = [module.register_forward_hook(keep) for module in dict.fromkeys(attention_modules(lm.model))]
            weights = lm.model(tokens, use_cache=False, output_attentions=True)
            weights = getattr(weights, "attentions", None) or ()
        except Exception as error:  # what a model itself does not do
            return worst, f"eager: {type(error).__name__}"
        finally:
            [handle.remove() for handle in handles]
            lm.model.set_attn_implementation(before)
    rows = torch.arange(2)[:, None]
    for own, traced_output in zip(outputs, trace.outputs, strict=True):
        worst = max(worst, (own[rows, positions] - traced_output).abs().max().item())
    weights = [w for w in weights if w is not None]
    if len(weights) != len(trace.logits):
        return worst, f"{len(weights)} maps for {len(trace.logits)} layers"
    for i, all_of_them in enumerate(weights):
        expected = all_of_them[rows, :, positions]  # (2, 2, H, S)
        expected = expected / expected.sum(-1, keepdim=True)
        worst = max(worst, (trace.logits[i].softmax(-1) - expected).abs().max().item())
    return worst, ""


def analysis(lm):
    import dataclasses

    import numpy as np
    import torch

    from momentum_lm.errors import UserError
    from momentum_lm.icl.datasets.loading import Example, LabelledDataset, load_spec
    from momentum_lm.studies import classification
    from momentum_lm.studies import icl_vs_finetuning as study

    try:
        worst, note = attention_apart(lm)
        if not worst < 2e-3:
            return f"wrong: {worst:.1e} {note}"
        texts = ("that is good", "that is bad", "a film", "bad film with a plot", "good", "that")
        films = [Example(i, (f"a film {text} is",), (" bad", " good"), i % 2) for i, text in enumerate(texts)]
        data = LabelledDataset(
            dataclasses.replace(load_spec("mr", "code"), name="films"), films, films, {"kind": "local"}
        )
        questions = classification.Settings(shots=(2,), seeds=(1,), batch_tokens=100)
        settings = study.Settings(questions, rates=(0.01,), controls=("untrained", "random", "lcgd"))
        before = {key: value.clone() for key, value in lm.model.state_dict().items()}
        with tempfile.TemporaryDirectory() as folder:
            study.analyse(lm, [data], settings, folder, show_progress=False)
            run = json.loads((Path(folder) / "results.json").read_text())["runs"][0]
        if not all(torch.equal(value, before[key]) for key, value in lm.model.state_dict().items()):
            return "wrong: the model's weights are others afterwards"
        if not all(np.isfinite(run["accuracy"][key]) for key in ("zero_shot", "in_context", "finetuned")):
            return "wrong: accuracy"
        return "right" + (f" ({note})" if note else "")
    except UserError as error:
        return f"refused: {error}" if "\n" not in str(error) else f"wrong: refusal of several lines: {error}"


def look(name):
    import torch

    try:
        model = tiny(name)
        with torch.no_grad():
            # sizes that do not fit each other are the configuration's fault
            model(torch.arange(20, 28)[None], use_cache=False)
    except Exception as error:
        return {"name": name, "evaluation": f"not built: {type(error).__name__}: {str(error)[:200]}"}
    found = {"name": name, "implementation": model.config._attn_implementation}
    try:
        found["evaluation"], lm = evaluation(model, name)
        if lm is not None:
            found["analysis"] = analysis(lm)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = next((frame for frame in reversed(frames) if "momentum_lm/" in frame.filename), frames[-1])
        key = "analysis" if "evaluation" in found else "evaluation"
        place = f"{Path(where.filename).name}:{where.lineno}"
        found[key] = f"crash: {type(error).__name__}: {str(error)[:150]} at {place}"
    return found


def isolated(name):
    """:func:`look` in a process of its own, of limited time and memory."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        signal.alarm(SECONDS)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            os.write(write, json.dumps(look(name)).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        found = file.read()
    status = os.waitpid(child, 0)[1]
    if found:
        return json.loads(found)
    limited = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGKILL, signal.SIGXCPU)
    return {"name": name, "evaluation": "not built: too large or too slow" if limited else f"crash: status {status}"}


def causal_names():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING]


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    import momentum_lm.lm.huggingface
    import momentum_lm.studies.icl_vs_finetuning  # noqa: F401

    for each in sys.argv[1:] or causal_names():
        print(json.dumps(isolated(each)), flush=True)
