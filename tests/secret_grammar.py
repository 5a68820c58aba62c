"""Random secrets in the formats of 2026, written from the vendors' descriptions, for the tests of masking.

Rule: nothing here comes from codex_accel, so that a mistake there cannot hide here. A grammar is a text in which
`{40:A}` is forty random characters of class A; what stands in `«»` is the secret, the rest is context that belongs to
the format. Every character is drawn anew, so no secret is one that the code has seen.
"""

import base64
import json
import random
import re
from urllib.parse import quote

LOWER, UPPER, DIGITS = "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
CLASSES = {
    "A": UPPER + LOWER + DIGITS,  # base62
    "U": UPPER + LOWER + DIGITS + "-_",  # base64url
    "B": UPPER + LOWER + DIGITS + "+/",  # base64
    "w": UPPER + LOWER + DIGITS + "_",
    "L": UPPER + LOWER,
    "l": LOWER + DIGITS,
    "X": UPPER + DIGITS,
    "K": UPPER + "234567",  # base32
    "h": "0123456789abcdef",
    "d": DIGITS,
    "P": UPPER + LOWER + DIGITS + "!#$%^*_+-=?~",  # of a password, without what needs quotes
    "Q": UPPER + LOWER + DIGITS + "!#$%^&*()_+-=?~.,;:[]{}|",  # of a password in quotes
    "z": UPPER + LOWER + DIGITS + "~_.-",
    "C": "qpzry9x8gf2tvdw0s3jn54khce6mua7l".upper(),  # bech32
}

FORMATS = {
    "openai project": "«sk-proj-{74:U}T3BlbkFJ{74:U}»",
    "openai project, 2024": "«sk-proj-{20:A}T3BlbkFJ{20:A}»",
    "openai project, without the mark": "«sk-proj-{120:U}»",
    "openai service account": "«sk-svcacct-{58:U}T3BlbkFJ{58:U}»",
    "openai admin": "«sk-admin-{58:U}T3BlbkFJ{58:U}»",
    "openai 48": "«sk-{20:A}T3BlbkFJ{20:A}»",
    "openai 48, without the mark": "«sk-{48:A}»",
    "deepseek": "«sk-{32:h}»",
    "anthropic api": "«sk-ant-api03-{93:U}AA»",
    "anthropic admin": "«sk-ant-admin01-{93:U}AA»",
    "anthropic oauth": "«sk-ant-oat01-{93:U}AA»",
    "anthropic refresh": "«sk-ant-ort01-{93:U}AA»",
    "openrouter": "«sk-or-v1-{64:h}»",
    "aws permanent id": "«AKIA{16:K}»",
    "aws temporary id": "«ASIA{16:K}»",
    "aws bearer id": "«ABIA{16:K}»",
    "aws context id": "«ACCA{16:K}»",
    "aws secret key, shell": "AWS_SECRET_ACCESS_KEY=«{40:B}»",
    "aws secret key, file": "aws_secret_access_key = «{40:B}»",
    "aws secret key, json": '"SecretAccessKey": "«{40:B}»"',
    "aws secret key, prompt": "AWS Secret Access Key [None]: «{40:B}»",
    "aws session token": "aws_session_token = «{356:B}»",
    "aws bedrock": "«ABSK{128:B}=»",
    "aws bedrock, short": "«bedrock-api-key-YmVkcm9jay5hbWF6b25hd3MuY29t{400:B}»",
    "google api": "«AIza{35:U}»",
    "google api, usual": "«AIzaSy{33:U}»",
    "google auth key": "«AQ.Ab8RN6{44:U}»",
    "google auth key, any": "«AQ.{50:U}»",
    "google oauth": "«ya29.a0{120:U}»",
    "google client secret": "«GOCSPX-{28:U}»",
    "github personal": "«ghp_{36:A}»",
    "github oauth": "«gho_{36:A}»",
    "github user": "«ghu_{36:A}»",
    "github server": "«ghs_{36:A}»",
    "github refresh": "«ghr_{76:A}»",
    "github fine-grained": "«github_pat_{22:A}_{59:A}»",
    "github stateless": "«ghs_{7:d}_eyJhbGciOiJSUzI1NiIsInR5cCI6IkpXVCJ9.eyJ{120:U}.{340:U}»",
    "gitlab personal": "«glpat-{20:U}»",
    "gitlab routable": "«glpat-{27:U}.01.{9:l}»",
    "gitlab routable, first": "«glpat-{60:U}.01{7:l}»",
    "gitlab deploy": "«gldt-{20:U}»",
    "gitlab runner": "«glrt-{20:U}»",
    "gitlab runner, routable": "«glrt-t1_{27:U}.01{7:l}»",
    "gitlab job": "«glcbt-64_{20:U}»",
    "gitlab trigger": "«glptt-{40:h}»",
    "gitlab feed": "«glft-{20:U}»",
    "gitlab mail": "«glimt-{25:U}»",
    "gitlab agent": "«glagent-{50:U}»",
    "gitlab oauth secret": "«gloas-{64:U}»",
    "gitlab scim": "«glsoat-{20:U}»",
    "gitlab flags": "«glffct-{20:U}»",
    "gitlab registration": "«GR1348941{20:U}»",
    "slack bot": "«xoxb-{12:d}-{13:d}-{24:A}»",
    "slack bot, old": "«xoxb-{12:d}-{24:A}»",
    "slack user": "«xoxp-{12:d}-{12:d}-{13:d}-{32:h}»",
    "slack workspace": "«xoxa-2-{12:d}-{12:d}-{12:d}-{32:h}»",
    "slack refresh, old": "«xoxr-{12:d}-{12:d}-{24:A}»",
    "slack session": "«xoxs-{11:d}-{11:d}-{11:d}-{10:h}»",
    "slack legacy": "«xoxo-{6:d}-{6:d}-{6:d}-{12:h}»",
    "slack rotating": "«xoxe.xoxp-1-{166:X}»",
    "slack rotating bot": "«xoxe.xoxb-1-{166:A}»",
    "slack refresh": "«xoxe-1-{146:A}»",
    "slack app": "«xapp-1-A{10:X}-{13:d}-{64:h}»",
    "slack webhook": "https://hooks.slack.com/services/«T{8:X}/B{10:X}/{24:A}»",
    "slack workflow": "https://hooks.slack.com/workflows/«T{8:X}/A{10:X}/{18:d}/{24:A}»",
    "hugging face": "«hf_{34:L}»",
    "hugging face organization": "«api_org_{34:L}»",
    "stripe live": "«sk_live_{24:A}»",
    "stripe live, long": "«sk_live_51{97:A}»",
    "stripe test": "«sk_test_{24:A}»",
    "stripe restricted": "«rk_live_{99:A}»",
    "stripe webhook": "«whsec_{32:A}»",
    "npm": "«npm_{36:A}»",
    "npm, file": "//registry.npmjs.org/:_authToken=«{8:h}-{4:h}-{4:h}-{4:h}-{12:h}»",
    "pypi": "«pypi-AgEIcHlwaS5vcmc{160:U}»",
    "test pypi": "«pypi-AgENdGVzdC5weXBpLm9yZw{160:U}»",
    "weights and biases": "«wandb_v1_{77:w}»",
    "weights and biases, old": "WANDB_API_KEY=«{40:h}»",
    "weights and biases, login": "wandb login «{40:h}»",
    "groq": "«gsk_{52:A}»",
    "replicate": "«r8_{37:A}»",
    "xai": "«xai-{80:A}»",
    "nvidia": "«nvapi-{64:U}»",
    "perplexity": "«pplx-{48:A}»",
    "azure storage": "AccountKey=«{86:B}==»",
    "azure storage, with its mark": "«{76:B}+ASt{5:B}A==»",
    "azure connection": "AccountName=store;AccountKey=«{86:B}==»;EndpointSuffix=core.windows.net",
    "azure service bus": "SharedAccessKey=«{43:B}=»",
    "azure client secret": "«{3:A}8Q~{34:z}»",
    "azure ai": "«{52:A}JQQJ99BAACYeBjFXJ3w3AAABACOG{4:A}»",
    "azure openai, old": "AZURE_OPENAI_API_KEY=«{32:h}»",
    "jwt": "«eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJ{90:U}.{43:U}»",
    "jwt, long": "«eyJhbGciOiJSUzI1NiIsImtpZCI6{900:U}.eyJ{1400:U}.{342:U}»",
    "jwe": "«eyJhbGciOiJSU0EtT0FFUCIsImVuYyI6IkEyNTZHQ00ifQ.{342:U}.{16:U}.{120:U}.{22:U}»",
    "url, postgres": "postgresql://admin:«{20:A}»@db.example.org:5432/app",
    "url, redis": "redis://:«{24:P}»@cache:6379/0",
    "url, mongo": "mongodb+srv://user:«{16:A}»@cluster0.mongodb.net/?retryWrites=true",
    "url, git": "https://oauth2:«{26:U}»@gitlab.example.com/a/b.git",
    "password, shell": "DB_PASSWORD=«{16:P}»",
    "password, yaml": "password: «{14:A}»",
    "password, json": '"password": "«{18:Q}»"',
    "password, python": "password='«{12:Q}»'",
    "password, call": 'connect(host="db", passwd="«{12:A}»", port=3)',
    "password, connection": "Server=db;User Id=sa;Password=«{14:A}»;Encrypt=true",
    "password, option": "mysql -u root --password=«{16:A}»",
    "password, option and space": "login --password «{16:A}»",
    "api key, yaml": "api_key: «{32:A}»",
    "api key, shell": "export MISTRAL_API_KEY=«{32:A}»",
    "api key, header": "X-Api-Key: «{40:A}»",
    "api key, words": "The API key is «{32:A}»",
    "api key, query": "https://example.com/v1?api_key=«{32:h}»&page=2",
    "client secret": "client_secret=«{40:A}»",
    "secret key": "SECRET_KEY = '«{50:Q}»'",
    "access token": '"access_token":"«{64:A}»"',
    "refresh token": "refresh_token: «{48:U}»",
    "token": "token = \"«{40:h}»\"",
    "bearer": "Authorization: Bearer «{48:U}»",
    "basic": "Authorization: Basic «{40:B}==»",
    "netrc": "machine api.wandb.ai login user password «{40:h}»",
    "sendgrid": "«SG.{22:U}.{43:U}»",
    "digitalocean": "«dop_v1_{64:h}»",
    "databricks": "«dapi{32:h}»",
    "docker": "«dckr_pat_{27:U}»",
    "telegram": "{10:d}:«AA{33:U}»",
    "shopify": "«shpat_{32:h}»",
    "grafana": "«glsa_{32:A}_{8:h}»",
    "linear": "«lin_api_{40:A}»",
    "notion": "«ntn_{11:d}{35:A}»",
    "vault": "«hvs.{95:U}»",
    "terraform": "«{14:A}.atlasv1.{67:U}»",
    "atlassian": "«ATATT3xFfGF0{180:U}»",
    "age": "«AGE-SECRET-KEY-1{58:C}»",
    "twilio": "«SK{32:h}»",
    "cerebras": "«csk-{48:l}»",
    "langsmith": "«lsv2_pt_{32:h}_{10:h}»",
    "together": "«tgp_v1_{43:U}»",
}  # fmt: skip

# Where a secret stands: the text around it. {s} is the secret with what belongs to its format.
SURROUNDINGS = {
    "alone": "{s}",
    "in prose": "the value is {s} and so on",
    "at the end of a sentence": "It was {s}. Then they left.",
    "before a comma": "take {s}, please",
    "in brackets": "(see [{s}])",
    "in angle brackets": "<{s}>",
    "in quotes": 'x = "{s}"',
    "in single quotes": "x = '{s}'",
    "in backquotes": "use `{s}` here",
    "after an identifier": "MY_{s}",
    "after an equals sign": "KEY={s}\n",
    "after CJK": "密钥是{s}。谢谢",
    "after Cyrillic": "ключ{s} конец",
    "after an accent": "clé{s} é",
    "after an escaped line break": "first\\n{s}\\nlast",
    "after an escaped escape": "first\\\\n{s}\\\\nlast",
    "after an escaped tab": "a\\t{s}\\r\\n",
    "after an escaped character": "x\\u0020{s}\\u0020y",
    "in colour": "\x1b[31m{s}\x1b[0m",
    "in escaped colour": "\\u001b[1;32m{s}\\u001b[0m",
    "after a percent escape": "q=%20{s}%20",
    "in an HTML element": "<code>{s}</code>",
    "at the end of a line": "a b\n{s}\nc d",
    "in a table": "| key | {s} | 7 |",
}

# Texts that look like secrets and are none.
TRAPS = {
    "words with sk-": "sk-learn, sk-estimator-html-doc-link, disk-usage, task-queue-worker, risk-adjusted-return",
    "css": ".sk-toggleable__label-arrow:before { color: #fff } .glide-slider { } .key-value-pair-list-item-wrapper {}",
    "git hash": "commit {40:h}\nMerge: {7:h} {7:h}\nindex {7:h}..{7:h} 100644",
    "file hashes": "sha256:{64:h}  model.safetensors\nmd5 {32:h}  a.txt\n{128:h}  b.tar.gz",
    "npm integrity": '"integrity": "sha512-{86:B}=="',
    "uuid": "id: {8:h}-{4:h}-4{3:h}-a{3:h}-{12:h}",
    "requirement": "pip install git+https://github.com/a/b@{40:h}",
    "base64 image": "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAA{2000:B}==",
    "source map": "//# sourceMappingURL=data:application/json;base64,eyJ2ZXJzaW9uIjozLCJzb3VyY2VzIjpb{900:B}",
    "protein": ">sp|P69905\n{60:amino}\n{60:amino}\nAKIA{56:amino}\n",
    "dna": "{240:dna}",
    "ssh public key": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI{43:B} me@host",
    "certificate": "-----BEGIN CERTIFICATE-----\n{64:B}\n{64:B}\n{20:B}==\n-----END CERTIFICATE-----",
    "pem public key": "-----BEGIN PUBLIC KEY-----\n{64:B}\n{40:B}==\n-----END PUBLIC KEY-----",
    "talk of keys": "A file begins with -----BEGIN PRIVATE KEY----- and ends with -----END PRIVATE KEY-----.",
    "token ids": '{"input_ids": [{5:d}, {5:d}, 50256], "token": "Ġhello", "num_tokens": 123456, "token_ids": [1, 2]}',
    "tokenizer settings": 'eos_token: "<|endoftext|>", pad_token="[PAD]", tokenizer: gpt2-large-tokenizer-v2',
    "code": "password = getpass.getpass()\ntoken = self.next_token(stream)\nsecret_key = settings.SECRET_KEY",
    "more code": "def login(password=None, passwd: str = '', api_key=os.environ['API_KEY']): return token == other",
    "placeholders": "password=<your password> api_key: ${API_KEY} token={{ token }} secret=xxxxxxxxxxxx KEY=your_key",
    "prose": "Password: required. The secret of the forest; tokens: words and parts. Bearer of bad news.",
    "paths": "PWD=/home/user/projects private_key: /etc/ssl/private/server.pem token_url: https://example.com/oauth/token",
    "urls": "http://localhost:8080/a@b https://web.archive.org/web/2020/http://x.org ftp://ftp.example.com:21/pub",
    "a port and a user": "ssh://git@github.com:22/a/b.git https://medium.com/@user",
    "publishable key": "pk_live_{24:A}",
    "version": "sk-1.2.3 hf_hub_url hf_transfer_enabled npm_config_registry npm_package_name r8_g8_b8 glrt-x",
}  # fmt: skip
CLASSES |= {"amino": "ACDEFGHIKLMNPQRSTVWY", "dna": "ACGT"}


def fill(text: str, draw: random.Random) -> str:
    """`text` with every `{40:A}` replaced by so many random characters of that class."""
    return re.sub(r"\{(\d+):(\w+)\}", lambda m: "".join(draw.choice(CLASSES[m[2]]) for _ in range(int(m[1]))), text)


def secret_of(name: str, draw: random.Random) -> tuple[str, str]:
    """One secret of a format: (the text that belongs to the format, the secret in it)."""
    if name == "private key":
        return private_key(draw)
    text = fill(FORMATS[name], draw)
    return text.replace("«", "").replace("»", ""), text[text.index("«") + 1 : text.index("»")]


PEM_KINDS = ("PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY", "DSA PRIVATE KEY", "OPENSSH PRIVATE KEY",
             "ENCRYPTED PRIVATE KEY", "PGP PRIVATE KEY BLOCK")  # fmt: skip


def private_key(draw: random.Random, *, line_break: str = "\n") -> tuple[str, str]:
    """A PEM block of a random kind and length, and its lines without the frame."""
    kind = draw.choice(PEM_KINDS)
    lines = [fill("{64:B}", draw) for _ in range(draw.randrange(1, 50))] + [fill("{22:B}==", draw)]
    head = ["Proc-Type: 4,ENCRYPTED", "DEK-Info: AES-128-CBC," + fill("{32:X}", draw), ""] if "RSA" in kind else []
    text = line_break.join([f"-----BEGIN {kind}-----", *head, *lines, f"-----END {kind}-----"])
    return text, "".join(lines)


def leaked(secret: str, output: str, *, length: int = 7) -> str | None:
    """A piece of `secret` of so many characters (or all of a shorter one) that stands in `output`."""
    length = min(length, len(secret))
    pieces = (secret[start : start + length] for start in range(len(secret) - length + 1))
    return next((piece for piece in pieces if piece in output), None)


ENCODINGS = {
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "base64, one byte later": lambda text: base64.b64encode(b"x" + text.encode()).decode(),
    "base64, two bytes later": lambda text: base64.b64encode(b"xy" + text.encode()).decode(),
    "base64url": lambda text: base64.urlsafe_b64encode(text.encode()).decode().rstrip("="),
    "hexadecimal": lambda text: text.encode().hex(),
    "percent, as URLs need": lambda text: quote(text, safe=""),
    "percent, every byte": lambda text: "".join(f"%{byte:02X}" for byte in text.encode()),
    "\\u escapes": lambda text: "".join(f"\\u{ord(letter):04x}" for letter in text),
    "\\x escapes": lambda text: "".join(f"\\x{ord(letter):02x}" for letter in text),
    "JSON": lambda text: json.dumps({"x": text}),
    "JSON in JSON": lambda text: json.dumps({"x": json.dumps({"y": text})}),
    "reversed": lambda text: text[::-1],
}
