"""A teacher's likeliest tokens, written beside each record, so that a student can learn from them without the teacher.

    python recipes/teacher_log_probabilities.py run.yaml TEACHER_DIRECTORY taught.jsonl

run.yaml is the student's (training.objective: distill): its tokenizer, template and mask decide which tokens are
trained, and the teacher must have the same tokenizer. Train on the result with `data: taught.jsonl` and no teacher.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from affina.config import load_config
from affina.data.build import source_spec, template_from_config, tokenizer_from_config
from affina.data.collate import collate
from affina.data.teacher import check_teacher
from affina.data.validation import read_conversations
from affina.models.forward import supervised_logits_reader
from affina.models.load import load_causal_lm


def write_teacher_tokens(
    config_path: Path, teacher_path: str, output: Path, *, top_k: int = 32, device: str = "cpu"
) -> int:
    """Write the records of the config's training data, each with its teacher; how many there were.

    top_k: tokens kept at each trained position. 32 hold more than 99% of the probability at most positions
    """
    config = load_config(config_path, ["training.objective=distill"]).config
    tokenizer = tokenizer_from_config(config.model)
    check_teacher(teacher_path, tokenizer)
    template = template_from_config(config, tokenizer)
    teacher = load_causal_lm(teacher_path, dtype=torch.float32 if device == "cpu" else torch.bfloat16, device=device)
    conversations = read_conversations([source_spec(source) for source in config.data.train])
    count = 0
    with open(output, "w", encoding="utf-8") as lines:
        for conversation in conversations:
            samples = template.encode(conversation, mask=config.data.mask)
            if len(samples) != 1 or len(samples[0]) > config.data.max_length:
                continue  # affina leaves these out of such a run as well
            batch = collate([samples[0].sample], num_tokens=None, pad_token_id=tokenizer.pad_id).to(device)
            read = supervised_logits_reader(teacher, batch)
            likeliest = read(slice(None)).log_softmax(dim=-1).topk(top_k)
            record = {
                "messages": [message.to_template() | {"train": message.train} for message in conversation.messages],
                "tools": list(conversation.tools),
                "teacher": {
                    "token_ids": likeliest.indices.tolist(),
                    # Six digits: a millionth of a nat, and half the file.
                    "log_probabilities": [[round(value, 6) for value in row] for row in likeliest.values.tolist()],
                },
            }
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
            count += 1
    return count


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    number = write_teacher_tokens(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
    print(f"{number} records in {sys.argv[3]}")
