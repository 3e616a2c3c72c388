"""Trains the demo's tokenizer: a SentencePiece BPE model of 128 pieces.

The vocabulary is tiny on purpose: every piece is met often, and a small model learns
to compare names within minutes. The syllables of the invented names are pieces of
their own, so a name is always three tokens; digits stand alone; the rest is learned
from generated text. Nothing is normalized and no space is added in front, so text may
be encoded in parts (document, then question) and gives the same ids as the whole.

    python train_tokenizer.py [tokenizer.model]
"""

import random
import sys

import sentencepiece as spm
import tasks


class Characters:  # stands in for the tokenizer that does not exist yet
    def encode(self, text):
        return list(text)


def train(path, vocab_size=128):
    lines = ["abcdefghijklmnopqrstuvwxyz 0123456789 . , : ? - ' ! ; ( )"] * 20
    for seed in range(300):
        for kind in tasks.KINDS:
            sample = tasks.make(kind, 800, seed, Characters(), n_questions=8)
            lines += sample.document.split("\n")
            for question in sample.questions:
                lines.append(f"question: {question.text} {question.answer}")
    random.Random(0).shuffle(lines)
    with open(path, "wb") as file:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=file,
            model_type="bpe",
            vocab_size=vocab_size,
            user_defined_symbols=["\n"] + tasks.SYLLABLES,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            character_coverage=1.0,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )


if __name__ == "__main__":
    path = sys.argv[1] if len(sys.argv) > 1 else "tokenizer.model"
    train(path)
    pieces = spm.SentencePieceProcessor(model_file=path)
    print([pieces.id_to_piece(i) for i in range(pieces.get_piece_size())])
    sample = tasks.make("mixed", 300, 0, pieces, n_questions=3)
    ids, _ = tasks.build_ids(sample, pieces)
    whole = sample.document + "\n"
    for question in sample.questions:
        whole += f"question: {question.text} {question.answer}\n"
    assert ids[1:] == pieces.encode(whole)
    assert pieces.decode(ids[1:]) == whole and 0 not in ids
    print(" ".join(pieces.id_to_piece(i) for i in ids[-160:]))
