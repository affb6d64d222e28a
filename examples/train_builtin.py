"""Trains the built-in model: a small Llama on the documentation that ships with Python.

The model exists so that SpotServe can be tried, tested and demonstrated without a download. Its corpus is on every
machine that has Python: the language topics of `pydoc` and the docstrings of some standard library modules. It is
trained partly on that prose and partly on questions and answers cut mechanically out of it, so that a chat gets
readable English. One seed, one thread and a sorted corpus make the run repeatable on one machine.

    python examples/train_builtin.py spotserve/builtin
"""

import argparse
import hashlib
import importlib
import inspect
import json
import keyword
import math
import platform
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data import topics

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AttentionInterface, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('role ' ~ message['role'] ~ ' is not one of system, user, assistant') -}}"
    "{%- endif -%}"
    "{{- '<|' ~ message['role'] ~ '|>\n' ~ message['content'] ~ ('<|end|>' if message['role'] == 'assistant' else '')"
    " ~ '\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}"
)

MODULES = """
    abc argparse array ast asyncio base64 bisect builtins bz2 calendar cmath cmd codecs collections
    collections.abc configparser contextlib copy csv dataclasses datetime decimal difflib enum fileinput fnmatch
    fractions functools gc getpass gettext glob gzip hashlib heapq hmac html http.client imaplib inspect io ipaddress
    itertools json linecache locale logging lzma math mimetypes multiprocessing netrc numbers operator os os.path
    pathlib pickle platform poplib pprint queue random re reprlib sched secrets selectors shelve shlex shutil signal
    smtplib socket socketserver sqlite3 ssl stat statistics string struct subprocess sys tarfile tempfile textwrap
    threading time timeit tokenize trace traceback types typing unicodedata unittest urllib.parse urllib.request uuid
    warnings weakref zipfile zlib
"""

SECTION_QUESTIONS = (
    "What is {the}?", "What is {a}?", "What is {bare}?", "What is {bare} in Python?", "What is {a} in Python?",
    "Explain {the}.", "Explain {bare} in Python.", "Explain {the} in Python.", "How does {the} work?",
    "Tell me about {the}.", "Tell me about {bare}.", "Describe {the}.", "What does {the} do?", "{bare}",
    "How do I use {the}?", "Can you explain {the}?", "Please explain {bare}.",
)  # fmt: skip
PLURAL_QUESTIONS = (
    "What are {bare}?", "What are {bare} in Python?", "Explain {bare}.", "Explain {bare} in Python.",
    "How do {bare} work?", "Tell me about {bare}.", "Describe {bare}.", "What do {bare} do?", "{bare}",
    "How do I use {bare}?", "Can you explain {bare}?",
)  # fmt: skip
MEMBER_QUESTIONS = ("What does {bare} do?", "Explain {bare}.", "What is {bare}?", "How do I use {bare}?", "{bare}")
MODULE_QUESTIONS = (
    "What is the {bare} module?", "What does the {bare} module do?", "Explain {bare}.",
    "What is {bare} in Python?", "Tell me about the {bare} module.",
)  # fmt: skip
GREETINGS = ("Hello", "Hello!", "Hi", "Hi there!", "Hey", "Good morning", "Who are you?", "What are you?")
HELP_QUESTIONS = ("What can you do?", "What can I ask you?", "Help me.", "Can you help me?", "Help")
PYTHON_QUESTIONS = ("What is Python?", "Tell me about Python.", "Explain Python.", "What is the Python language?")
SYSTEM_PROMPTS = ("You are a helpful assistant.", "You are a helpful assistant that knows Python.", "Be brief.")

NAMES = ("None", "NotImplemented", "Ellipsis", "Python", "False", "True")
UNDERLINE = re.compile(r"[*=\-~^\"]{3,}")
SIGNATURE = re.compile(r"(?:class |coroutine )?([A-Za-z_][\w.]*)\(.*\)")
EMPHASIS = re.compile(r"(?<![\w*])\*(\w(?:[^*\n]*\w)?)\*(?![\w*])")
LISTED = re.compile(r"(?:[*\-+]|\d+\.) ")


@dataclass(slots=True)
class Exchange:
    """One answer of the corpus, the phrases that ask for it and how much more often than others it is drawn."""

    questions: tuple[str, ...]
    subject: str
    answer: str
    weight: float

    def question(self, random: np.random.Generator) -> str:
        """Draws one way to ask."""
        subject = self.subject
        article = "an" if subject[:1].lower() in "aeiou" else "a"
        phrases = {"bare": subject, "the": f"the {subject}", "a": f"{article} {subject}"}
        text = str(random.choice(self.questions)).format(**phrases)
        form = random.random()
        if form < 0.15:
            return text.rstrip("?.")
        return text[0].lower() + text[1:] if form < 0.3 else text


@dataclass(slots=True)
class Corpus:
    """The prose, one text per document, and the exchanges cut out of it."""

    documents: list[str]
    exchanges: list[Exchange]

    def digest(self) -> str:
        """Names these exact texts."""
        content = [self.documents, [asdict(exchange) for exchange in self.exchanges]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(slots=True)
class Block:
    """A paragraph, heading or indented example of a documentation page."""

    kind: str
    text: str


# --- corpus -------------------------------------------------------------------------------------------------------


def read_corpus() -> Corpus:
    """Reads the topics, then the docstrings, each in sorted order."""
    corpus = Corpus(documents=[], exchanges=[])
    seen: set[str] = set()
    for name in sorted(topics.topics):
        blocks = list(read_blocks(topics.topics[name]))
        # Topics include one another's sections; a second copy would only cost training steps.
        fresh = [block for block in blocks if block.kind == "heading" or block.text not in seen]
        seen.update(block.text for block in blocks)
        if len(fresh) > 1:
            corpus.documents.append("\n\n".join(block.text for block in fresh))
        corpus.exchanges.extend(topic_exchanges(name, blocks))
    for name in sorted(MODULES.split()):
        add_module(corpus, name, seen)
    about = "I am a small language model. I was trained on the documentation of the Python programming language."
    ask = 'Ask me about the Python language, for example: "What is a for statement?"'
    corpus.exchanges.append(Exchange(GREETINGS, "", f"Hello! {about} {ask}", 12.0))
    corpus.exchanges.append(Exchange(HELP_QUESTIONS, "", f"{ask} {about}", 6.0))
    corpus.exchanges.append(Exchange(PYTHON_QUESTIONS, "", f"Python is a programming language. {ask}", 6.0))
    # One answer to a question: the first.
    unique = {exchange.subject.lower() or exchange.answer: exchange for exchange in reversed(corpus.exchanges)}
    corpus.exchanges = list(reversed(unique.values()))
    return corpus


def read_blocks(page: str) -> Iterator[Block]:
    """Splits a page at blank lines, joins the lines of wrapped prose and drops grammar productions."""
    for typographic, typed in (("’", "'"), ("‘", "'"), ("“", '"'), ("”", '"'), ("…", "..."), ("–", "-"), ("—", "-")):
        page = page.replace(typographic, typed)
    for raw in re.split(r"\n\s*\n", page.strip("\n")):
        lines = raw.rstrip().split("\n")
        if "::=" in raw or not raw.strip() or re.fullmatch(r"\s*(New|Changed) in version [\d.]+\.?", raw):
            continue
        if len(lines) >= 2 and UNDERLINE.fullmatch(lines[1].strip()):
            yield Block("heading", lines[0].strip())
        elif len(lines) == 1 and SIGNATURE.fullmatch(lines[0].strip()):
            yield Block("signature", lines[0].strip())
        elif is_prose(lines):
            yield Block("prose", plain(" ".join(line.strip() for line in lines)))
        else:
            yield Block("example", inspect.cleandoc(raw) if raw.startswith(" ") else raw)


def is_prose(lines: list[str]) -> bool:
    """Tells wrapped sentences from code, tables and lists."""
    first = lines[0].strip()
    depths = {len(line) - len(line.lstrip()) for line in lines}
    sentence = first[:1].isupper() or lines[0][0] != " "
    ends = lines[-1].rstrip().endswith((".", ":", "?", "!", ")", '."'))
    marked = LISTED.match(first) or first.startswith((">>>", "|", "+"))
    return len(depths) == 1 and sentence and ends and not marked


def plain(text: str) -> str:
    """Removes footnote marks and emphasis."""
    return re.sub(r" +", " ", EMPHASIS.sub(r"\1", re.sub(r" ?\[\d+\]", "", text)))


def topic_exchanges(name: str, blocks: list[Block]) -> Iterator[Exchange]:
    """Cuts an exchange out of every section and every described method of a topic."""
    for index, block in enumerate(blocks):
        answer = opening(blocks[index + 1 :])
        if not answer:
            continue
        if block.kind == "heading":
            subject = section_subject(block.text)
            one = singular(subject)
            if one != subject:
                yield Exchange(PLURAL_QUESTIONS, subject, answer, 2.0)
            yield Exchange(SECTION_QUESTIONS, one, answer, 3.0)
            if index == 0 and keyword.iskeyword(name):
                yield Exchange(SECTION_QUESTIONS, name, answer, 3.0)
                yield Exchange(SECTION_QUESTIONS, f"{name} keyword", answer, 2.0)
            if subject in ("for statement", "while statement"):
                yield Exchange(SECTION_QUESTIONS, subject.replace("statement", "loop"), answer, 3.0)
        elif found := SIGNATURE.fullmatch(block.text):
            yield Exchange(MEMBER_QUESTIONS, found[1].removeprefix("object."), answer, 1.0)


def opening(blocks: list[Block], limit_chars: int = 520) -> str:
    """The first paragraphs that follow a heading; empty when no prose follows it."""
    taken: list[str] = []
    for block in blocks:
        if block.kind in ("heading", "signature") or (not taken and block.kind != "prose"):
            break
        if taken and sum(map(len, taken)) + len(block.text) > limit_chars:
            break
        taken.append(block.text)
    if taken and taken[-1].endswith(":"):
        taken[-1] = taken[-1][:-1] + "."
    return "\n\n".join(taken) if taken and len(taken[0]) <= 900 else ""


def section_subject(heading: str) -> str:
    """Turns a heading such as `The "for" statement` into a subject such as `for statement`."""
    heading = re.sub(r"^[\d.]+ ", "", heading.replace('"', "").replace("`", ""))
    heading = re.sub(r"^(The|A|An) ", "", heading)
    heading = plain(heading).replace(" - ", ", ")
    return " ".join(word.lower() if word.istitle() and word not in NAMES else word for word in heading.split())


def singular(subject: str) -> str:
    """Turns `dictionaries` into `dictionary`, so that a question can ask for one."""
    for plural, ending in (("ies", "y"), ("sses", "ss"), ("es", "e"), ("s", "")):
        if subject.endswith(plural) and not subject.endswith(("ss", "us", "__slots__", "Ellipsis")):
            return subject.removesuffix(plural) + ending
    return subject


def add_module(corpus: Corpus, name: str, seen: set[str]) -> None:
    """Adds the docstrings of a module and of its public functions, classes and methods."""
    module = importlib.import_module(name)
    texts: list[str] = []
    for path, docstring in module_docstrings(name, vars(module)):
        blocks = [block for block in read_blocks(docstring) if block.kind != "heading"]
        text = "\n\n".join(block.text for block in blocks)
        if text in seen or len(text) < 20:
            continue
        seen.add(text)
        texts.append(f"{path}\n\n{text}")
        answer = opening([block for block in blocks if block.kind != "signature"], 300)
        if answer:
            is_module = path == name and inspect.ismodule(module) and docstring == inspect.getdoc(module)
            corpus.exchanges.append(
                Exchange(MODULE_QUESTIONS if is_module else MEMBER_QUESTIONS, path, answer, 2.0 if is_module else 0.4)
            )
    if texts:
        corpus.documents.append("\n\n".join(texts)[:12_000])


def module_docstrings(name: str, members: dict[str, object]) -> Iterator[tuple[str, str]]:
    """Yields the dotted path and docstring of a module, then of what it defines."""
    if isinstance(members.get("__doc__"), str):
        yield name, inspect.cleandoc(str(members["__doc__"]))
    prefix = "" if name == "builtins" else f"{name}."
    for member_name in sorted(members):
        member = members[member_name]
        own = getattr(member, "__module__", None)
        if member_name.startswith("_") or not callable(member) or str(own).strip("_") not in (name, "None"):
            continue
        yield f"{prefix}{member_name}", inspect.getdoc(member) or ""
        if inspect.isclass(member):
            for method_name, method in sorted(vars(member).items()):
                docstring = getattr(method, "__doc__", None)
                if not method_name.startswith("_") and callable(method) and isinstance(docstring, str):
                    yield f"{prefix}{member_name}.{method_name}", inspect.cleandoc(docstring)


# --- tokenizer ----------------------------------------------------------------------------------------------------


def train_tokenizer(corpus: Corpus, vocabulary_size: int) -> Tokenizer:
    """Trains a byte-level BPE without BOS, so that every text round-trips and nothing is added to a prompt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[AddedToken(token, special=True) for token in (PAD, END, SYSTEM, USER, ASSISTANT)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    answers = [exchange.answer for exchange in corpus.exchanges]
    tokenizer.train_from_iterator(corpus.documents + answers * 2, trainer)
    return tokenizer


# --- batches ------------------------------------------------------------------------------------------------------


class Batches:
    """Draws rows of tokens: windows of prose, and conversations that start at position 0."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, random: np.random.Generator, chat_share: float) -> None:
        self.exchanges = corpus.exchanges
        self.tokenizer = tokenizer
        self.random = random
        self.chat_share = chat_share
        weights = np.array([exchange.weight for exchange in corpus.exchanges])
        self.chances = weights / weights.sum()
        documents = [tokenizer.encode(text + END).ids for text in corpus.documents]
        self.prose = np.array([token for document in documents for token in document], dtype=np.int64)

    def draw(self, num_rows: int, length: int) -> torch.Tensor:
        """Draws `num_rows` rows of `length` + 1 tokens, the last being only a label."""
        rows = [
            self.chat(length + 1) if self.random.random() < self.chat_share else self.window(length + 1)
            for _ in range(num_rows)
        ]
        return torch.from_numpy(np.stack(rows))

    def window(self, length: int) -> np.ndarray:
        start = int(self.random.integers(0, len(self.prose) - length))
        return self.prose[start : start + length]

    def chat(self, length: int) -> np.ndarray:
        """Strings exchanges together until the row is full: a conversation of several turns."""
        tokens: list[int] = []
        while len(tokens) < length:
            text = ""
            if not tokens and self.random.random() < 0.2:
                text = f"{SYSTEM}\n{self.random.choice(SYSTEM_PROMPTS)}\n"
            exchange = self.exchanges[int(self.random.choice(len(self.exchanges), p=self.chances))]
            text += f"{USER}\n{exchange.question(self.random)}\n{ASSISTANT}\n{exchange.answer}{END}\n"
            tokens.extend(self.tokenizer.encode(text).ids)
        return np.array(tokens[:length], dtype=np.int64)


# --- training -----------------------------------------------------------------------------------------------------


def build_model(vocabulary_size: int, tokenizer: Tokenizer) -> LlamaForCausalLM:
    """A Llama of about 7 MB: too large for one emulated GPU of 6 MiB, small enough for two.

    Every width is a multiple of 16; 8 query heads make 8 reduction chunks and allow 8 tensor ranks, 4 KV heads make
    ranks share one, and 6 layers divide unevenly among 4 pipeline stages.
    """
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def attend_short_rows(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention as two plain products: with short rows and heads of 16 faster on a CPU than the fused one."""
    num_rows, num_heads, length, width = query.shape
    num_sharing = num_heads // key.shape[1]
    query = query.to(value.dtype).flatten(0, 1)
    key, value = (states.to(value.dtype).repeat_interleave(num_sharing, dim=1).flatten(0, 1) for states in (key, value))
    future = torch.full((length, length), -math.inf, dtype=value.dtype).triu(1).expand(num_rows * num_heads, -1, -1)
    with torch.autocast("cpu", enabled=False):  # it would widen the scores, which are most of the traffic
        scores = torch.baddbmm(future, query, key.transpose(1, 2), alpha=scaling)
        mixed = torch.bmm(torch.softmax(scores, dim=-1), value)
    return mixed.view(num_rows, num_heads, length, width).transpose(1, 2).contiguous(), None


def train(model: LlamaForCausalLM, batches: Batches, arguments: argparse.Namespace) -> float:
    """Trains with a cosine schedule, some of the last steps on rows as long as the context; returns the last loss."""
    embedding = model.get_input_embeddings().weight
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1 and parameter is not embedding]
    others = [parameter for parameter in model.parameters() if parameter.dim() == 1 or parameter is embedding]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
    ]
    long_rows = model.config.max_position_embeddings
    started_s, tokens, recent = time.monotonic(), 0, 0.0
    AttentionInterface.register("short_rows", attend_short_rows)
    model.train()
    for step in range(arguments.steps):
        progress = step / arguments.steps
        rate = arguments.rate * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        is_long = progress >= 0.7 and step % 4 == 0
        model.set_attn_implementation("sdpa" if is_long else "short_rows")
        rows = batches.draw(2, long_rows) if is_long else batches.draw(arguments.batch, arguments.length)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=arguments.bfloat16):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tokens += rows[:, 1:].numel()
        recent = loss.item() if step == 0 else 0.96 * recent + 0.04 * loss.item()
        if step % 50 == 0 or step == arguments.steps - 1:
            speed = tokens / (time.monotonic() - started_s)
            say(f"step {step} loss {recent:.3f} rate {rate:.5f} {speed:.0f} tokens/s")
    return recent


# --- folder -------------------------------------------------------------------------------------------------------


def write_folder(folder: Path, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """Writes the model as transformers and the coordinator read it: safetensors and JSON only."""
    model.eval()
    model.generation_config = GenerationConfig(
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=True, temperature=0.3, top_p=0.9, top_k=0,
    )  # fmt: skip
    model.save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END, pad_token=PAD, extra_special_tokens=[SYSTEM, USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_max_length=model.config.max_position_embeddings,
    )  # fmt: skip
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(folder, save_jinja_files=False)
    (folder / "model.safetensors").chmod(0o644)  # it is written for its owner only, but a package is for everyone


def write_readme(folder: Path, arguments: argparse.Namespace, corpus: Corpus, num_tokens: int, loss: float) -> None:
    """Writes how the folder was made."""
    lines = [
        "# SpotServe's built-in model",
        "",
        "A Llama of 6 layers (float32, tied embeddings) that talks about the Python language. It is here so that",
        "SpotServe can be tried and tested without a download; it is too small to be right. Its weights do not fit on",
        "one emulated GPU of 6 MiB, so that a replica needs two.",
        "",
        "| | |",
        "|---|---|",
        f"| Command | `{command_line(arguments)}` |",
        f"| Corpus | `pydoc_data.topics` and docstrings of {len(MODULES.split())} standard library modules of Python"
        f" {platform.python_version()}: {len(corpus.documents)} documents, {num_tokens:,} tokens of prose,"
        f" {len(corpus.exchanges):,} questions and answers of which the script cut all but three out of them |",
        f"| Corpus digest | sha256 `{corpus.digest()}` |",
        f"| Seed | {arguments.seed} |",
        f"| Steps | {arguments.steps} |",
        f"| Final loss | {loss:.3f} (mean of the last steps, over prose and chats, on training text) |",
        f"| Made with | torch {torch.__version__.split('+')[0]} on CPU, one thread |",
        "",
        "The text of the corpus is part of Python and under the PSF licence.",
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def command_line(arguments: argparse.Namespace) -> str:
    flags = " ".join(f"--{name} {getattr(arguments, name)}" for name in ("seed", "steps", "batch", "length", "rate"))
    return f"python examples/train_builtin.py spotserve/builtin {flags}{' --bfloat16' if arguments.bfloat16 else ''}"


def answer(folder: Path, question: str, num_tokens: int = 64) -> str:
    """Asks the saved model, greedily, through transformers."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=num_tokens, do_sample=False, temperature=None, top_p=None)
    return str(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    """Reads the corpus, trains tokenizer and model, writes the folder."""
    parser = argparse.ArgumentParser(description="Train SpotServe's built-in model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch", type=int, default=20, help="rows in a step")
    parser.add_argument("--length", type=int, default=192, help="tokens in a row, but for the long rows near the end")
    parser.add_argument("--rate", type=float, default=0.004, help="highest learning rate")
    parser.add_argument("--bfloat16", action="store_true", help="multiply in bfloat16, where the CPU can")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    corpus = read_corpus()
    tokenizer = train_tokenizer(corpus, vocabulary_size=2048)
    batches = Batches(corpus, tokenizer, np.random.default_rng(arguments.seed), chat_share=0.6)
    model = build_model(2048, tokenizer)
    say(f"corpus {corpus.digest()} of Python {platform.python_version()}: {len(corpus.documents)} documents,")
    say(f"{len(batches.prose)} tokens, {len(corpus.exchanges)} exchanges; {model.num_parameters()} parameters")
    loss = train(model, batches, arguments)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_folder(arguments.folder, model, tokenizer)
    write_readme(arguments.folder, arguments, corpus, len(batches.prose), loss)
    for question in ("What is a for statement?", "Explain lambda in Python.", "What does str.split do?", "Hello!"):
        say(f"--- {question}\n{answer(arguments.folder, question)}")


if __name__ == "__main__":
    main()
