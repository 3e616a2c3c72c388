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
            s = tasks.make(kind, 800, seed, Characters(), n_questions=8)
            lines += s.document.split("\n")
            for q in s.questions:
                lines.append(f"question: {q.text} {q.answer}")
    random.Random(0).shuffle(lines)
    with open(path, "wb") as f:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=f,
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
    sp = spm.SentencePieceProcessor(model_file=path)
    print([sp.id_to_piece(i) for i in range(sp.get_piece_size())])
    s = tasks.make("mixed", 300, 0, sp, n_questions=3)
    ids, where = tasks.build_ids(s, sp)
    whole = s.document + "\n" + "".join(f"question: {q.text} {q.answer}\n" for q in s.questions)
    assert ids[1:] == sp.encode(whole) and sp.decode(ids[1:]) == whole and 0 not in ids
    print(" ".join(sp.id_to_piece(i) for i in ids[-160:]))
