"""What secrets and personal data look like: tables, one row a family.

Rule: a row is data. `safety` gives every row the same treatment; a new format is a new row and a line in the tests'
grammar. Shapes are those of 2026, from the vendors' pages and, where those are silent, from what public scanners look
for (gitleaks, betterleaks, trufflehog, detect-secrets; read in November 2026). Lower limits are below the true lengths,
so that a cut or lengthened token is masked too; `run` swallows the rest.

A match of `pattern` begins with one of `anchors`, or `offset` characters before it. What its groups hold is masked, or
the whole match where it has none. Then, to any length, characters of `run` follow, with a match of `bridge` between two
runs, until `stop` matches (it stays) or `last` does (it is masked too).
"""

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

TOKEN = r"A-Za-z0-9_\-"  # the alphabet of base64url, and of most tokens
BASE64 = "A-Za-z0-9+/"
DOTTED = rf"[.][{TOKEN}]"  # a dot inside of a token, not one that ends a sentence

# What stands before a match (a regular expression, read up to where the match begins).
ESCAPE = (
    r"\\+(?:[abefnrtv0]|u[0-9A-Fa-f]{4}|x[0-9A-Fa-f]{2}|033)|%[0-9A-Fa-f]{2}"
    r"|(?:\x1b|\\+(?:u001[bB]|x1[bB]|033|e))\[[0-9;]{0,11}m"
)
WORD_START = rf"\A|[^A-Za-z0-9]|{ESCAPE}"  # no letter or digit, unless it ends an escape: \n, \u0020, %3D, ESC[31m
BASE64_START = rf"\A|[^A-Za-z0-9+/=]|{ESCAPE}|[=]"  # not inside of a longer base64 text
FLAG = r"--?[A-Za-z][A-Za-z_-]{0,24}|--"  # of a command line
QUERY = r"[?&;]|&amp;"


@dataclass(frozen=True)
class Family:
    """One kind of secret; see the module for how the fields work together."""

    id: str
    meaning: str
    anchors: tuple[str, ...]  # none: the pattern is searched everywhere, which is slower
    pattern: str
    ignore_case: bool = False  # of anchors and pattern
    offset: int = 0
    before: str = ""  # a regular expression that what stands before must end with; "" is anything
    after: str = ""  # a set of characters, as in [...], that must not follow
    run: str = ""  # a set of characters, as in [...]
    bridge: str = ""
    stop: str = ""
    last: str = ""
    check: str = ""  # a function of plausibility.CHECKS


def token(
    id: str, meaning: str, *anchors: str, least: int, letters: str = TOKEN, run: str = TOKEN, **more: str
) -> Family:
    """A row for `<anchor><at least so many letters>`, the commonest shape. Its check sees 64 letters."""
    pattern = "(?:" + "|".join(anchor.replace(".", "[.]") for anchor in anchors) + f")[{letters}]{{{least},64}}"
    return Family(id, meaning, anchors, pattern, run=run, **more)  # type: ignore[arg-type]


# --- vendors' tokens: the anchor is enough ---------------------------------------------------------------------------

TOKENS = (
    Family(
        "anthropic", "Anthropic API, admin and OAuth keys", ("sk-ant-",),
        rf"sk-ant-[a-z]{{2,8}}[0-9]{{2}}-[{TOKEN}]{{16,64}}", run=TOKEN, bridge=DOTTED,
    ),
    token("openrouter", "OpenRouter keys", "sk-or-v1-", "sk-or-", least=32),
    token(
        "openai", "OpenAI project, service account and admin keys", "sk-proj-", "sk-svcacct-", "sk-admin-",
        "sk-service-", "sk-None-", least=20, check="mixed_case",
    ),
    Family(
        "openai-legacy", "OpenAI keys of the old form, and DeepSeek's and others' that look like them", ("sk-",),
        r"sk-[A-Za-z0-9]{32,64}", before=WORD_START, run="A-Za-z0-9", check="random",
    ),
    Family(
        "github", "GitHub personal, OAuth, user, server and refresh tokens", ("ghp_", "gho_", "ghu_", "ghs_", "ghr_"),
        rf"gh[pousr]_(?:[{TOKEN}]|{DOTTED}){{30,64}}", run=TOKEN, bridge=DOTTED, check="varied",
    ),
    token("github-fine-grained", "GitHub fine-grained tokens", "github_pat_", least=22, letters="A-Za-z0-9_"),
    token(
        "gitlab", "GitLab tokens: personal, deploy, runner, job, trigger, feed, mail, agent, OAuth, SCIM, flags",
        "glpat-", "gldt-", "glrt-", "glrtr-", "glcbt-", "glptt-", "glft-", "glimt-", "glagent-", "gloas-", "glsoat-",
        "glffct-", "glwt-", "GR1348941", "_gitlab_session=", least=20, bridge=DOTTED,
    ),
    Family(
        "slack", "Slack bot, user, app, configuration, refresh, legacy and session tokens", ("xox", "xapp-"),
        r"(?:xox[abcdeoprs](?:[.]xox[abp])?|xapp)-[A-Za-z0-9%/+-]{10,64}", run="A-Za-z0-9%/+=-", check="has_digit",
    ),
    Family(
        "slack-webhook", "Slack webhook addresses", ("hooks.slack",),
        rf"hooks[.]slack(?:-gov)?[.]com\\{{0,2}}/(?:services|workflows|triggers)\\{{0,2}}/([{TOKEN}/\\]{{16,64}})",
        run=rf"{TOKEN}/\\",
    ),
    Family(
        "discord-webhook", "Discord webhook addresses", ("/api/webhooks/",),
        rf"/api/webhooks/([0-9]{{15,20}}/[{TOKEN}]{{30,64}})", run=TOKEN,
    ),
    token("huggingface", "Hugging Face tokens", "hf_", "api_org_", least=30, letters="A-Za-z0-9", check="mixed_case",
          before=WORD_START),
    token("stripe", "Stripe secret and restricted keys", "sk_live_", "sk_test_", "sk_prod_", "rk_live_", "rk_test_",
          "rk_prod_", least=10, letters="A-Za-z0-9", before=WORD_START, check="random"),
    token("stripe-webhook", "Stripe webhook secrets", "whsec_", least=24, letters=f"{BASE64}%", run=f"{BASE64}%="),
    token("npm", "npm tokens", "npm_", least=32, letters="A-Za-z0-9", before=WORD_START, check="random"),
    token("pypi", "PyPI and TestPyPI upload tokens", "pypi-AgE", least=20),
    token("wandb", "Weights & Biases keys", "wandb_v1_", least=30),
    Family(
        "wandb-legacy", "Weights & Biases keys of the old form, after `wandb login`", ("wandb login", "wandb.login("),
        r"(?:wandb login |wandb[.]login[(])[ ]{0,2}(?:--?[a-z-]{1,20}[ =]|key[ =]{1,3})?[\"']?([0-9a-f]{40})",
        after="A-Za-z0-9",
    ),
    token("groq", "Groq keys", "gsk_", least=40, letters="A-Za-z0-9", before=WORD_START, check="random"),
    token("replicate", "Replicate tokens", "r8_", least=32, letters="A-Za-z0-9", before=WORD_START, check="random"),
    token("xai", "xAI keys", "xai-", least=40, before=WORD_START, check="mixed_case"),
    token("nvidia", "NVIDIA keys", "nvapi-", least=40),
    token("perplexity", "Perplexity keys", "pplx-", least=32, letters="A-Za-z0-9", check="random"),
    token("cerebras", "Cerebras keys", "csk-", least=40, letters="A-Za-z0-9", before=WORD_START, check="random"),
    token("together", "Together AI keys", "tgp_v1_", least=30),
    token("langsmith", "LangSmith keys", "lsv2_pt_", "lsv2_sk_", least=24),
    token("pinecone", "Pinecone keys", "pcsk_", least=32, check="random"),
    token("elevenlabs", "ElevenLabs keys", "sk_", least=40, letters="0-9A-Fa-f", before=WORD_START, check="random"),
    token("runpod", "RunPod keys", "rpa_", least=36, letters="A-Za-z0-9", before=WORD_START, check="random"),
    token("google", "Google API keys", "AIza", least=30, before=WORD_START, check="random"),
    token("google-auth-key", "Google authorization keys (Gemini, since 2026)", "AQ.", least=30, before=WORD_START,
          check="mixed_case"),
    token("google-oauth", "Google OAuth access tokens", "ya29.", least=20, bridge=DOTTED),
    token("google-client-secret", "Google OAuth client secrets", "GOCSPX-", least=20),
    token("google-refresh", "Google OAuth refresh tokens", "1//0", least=30, before=WORD_START, check="random"),
    Family(
        "aws-key-pair", "an AWS access key id with the secret key beside it", ("AKIA", "ASIA"),
        rf"(A[KS]IA[A-Z0-9]{{16}})[\s,:;|\"']{{1,4}}([{BASE64}]{{40}})", before=WORD_START, after=f"{BASE64}=",
    ),
    Family("aws-access-key-id", "AWS access key ids", ("AKIA", "ASIA", "ABIA", "ACCA"),
           r"A(?:[KS]IA|BIA|CCA)[A-Z0-9]{16}", before=WORD_START, after="A-Za-z0-9", check="access_key_id"),
    token("aws-bedrock", "Amazon Bedrock keys", "ABSK", least=40, letters=f"{BASE64}%", run=f"{BASE64}%=",
          before=BASE64_START, check="mixed_case"),
    token("aws-bedrock-short", "Amazon Bedrock keys of the short-lived form", "bedrock-api-key-", least=20,
          letters=f"{BASE64}%", run=f"{BASE64}%="),
    Family(
        "azure-client-secret", "Azure (Entra) client secrets", ("Q~",),
        r"[A-Za-z0-9_~.]{3}[0-9]Q~[A-Za-z0-9_~.-]{31}", offset=4, run="A-Za-z0-9_~-", bridge="[.][A-Za-z0-9_~-]",
    ),
    Family(
        "azure-identifiable", "Azure storage and Cosmos keys, by their mark", ("+ASt", "ACDb"),
        rf"[{BASE64}]{{76}}(?:[+]ASt|ACDb)[{BASE64}]{{5}}[AQgw]==", offset=76, before=BASE64_START,
    ),
    Family(
        "azure-ai", "Azure AI and OpenAI keys, by their mark", ("JQQJ9",),
        r"[A-Za-z0-9]{52}JQQJ9[A-Za-z0-9]{27}", offset=52, before=WORD_START, after="A-Za-z0-9",
    ),
    Family(
        "azure-connection", "keys in Azure connection strings", ("AccountKey=", "SharedAccessKey=", "AccessKey="),
        rf"(?:Account|SharedAccess|Access)Key=([{BASE64}]{{20,64}})", run=f"{BASE64}=",
    ),
    Family("azure-sas", "signatures of shared access addresses", ("sig=",), r"sig=([A-Za-z0-9%+/]{30,64})",
           before=QUERY, run="A-Za-z0-9%+/=", check="random"),
    token("databricks", "Databricks tokens", "dapi", least=32, letters="0-9A-Fa-f", run="0-9A-Fa-f-",
          before=WORD_START),
    token("digitalocean", "DigitalOcean tokens", "dop_v1_", "doo_v1_", "dor_v1_", least=32, letters="0-9A-Fa-f"),
    token("docker", "Docker Hub tokens", "dckr_pat_", "dckr_oat_", least=20),
    token("doppler", "Doppler tokens", "dp.pt.", "dp.st.", "dp.ct.", "dp.sa.", "dp.scim.", least=30, bridge=DOTTED),
    token("fly", "Fly.io tokens", "fo1_", "fm1r_", "fm1a_", "fm2_", least=40, letters=f"{TOKEN}+/", run=f"{TOKEN}+/=,",
          before=WORD_START, check="mixed_case"),
    token("grafana", "Grafana tokens", "glsa_", "glc_", least=30, letters=f"{TOKEN}+/", run=f"{TOKEN}+/="),
    token("hashicorp-vault", "Vault tokens", "hvs.", "hvb.", "hvr.", least=24, before=WORD_START, check="mixed_case"),
    Family("terraform", "Terraform Cloud tokens", (".atlasv1.",), rf"[A-Za-z0-9]{{14}}[.]atlasv1[.][{TOKEN}=]{{40}}",
           offset=14, run=f"{TOKEN}="),
    token("heroku", "Heroku keys", "HRKU-AA", least=40),
    token("linear", "Linear keys", "lin_api_", "lin_oauth_", least=32),
    token("mailgun", "Mailgun keys", "key-", least=32, letters="0-9A-Fa-f", run="0-9A-Fa-f", before=WORD_START),
    token("new-relic", "New Relic keys", "NRAK-", "NRII-", "NRJS-", least=19),
    token("notion", "Notion tokens", "ntn_", least=40, letters="A-Za-z0-9", before=WORD_START, check="random"),
    token("planetscale", "PlanetScale tokens", "pscale_tkn_", "pscale_pw_", "pscale_oauth_", least=24),
    token("postman", "Postman keys", "PMAK-", least=24),
    token("pulumi", "Pulumi tokens", "pul-", least=40, letters="0-9A-Fa-f", before=WORD_START),
    token("rubygems", "RubyGems keys", "rubygems_", least=40, letters="0-9A-Fa-f"),
    Family("sendgrid", "SendGrid keys", ("SG.",), rf"SG[.][{TOKEN}]{{16,32}}[.][{TOKEN}]{{20,64}}", before=WORD_START,
           run=TOKEN),
    token("sentry", "Sentry tokens", "sntrys_", "sntryu_", least=30, letters=f"{TOKEN}+/=", run=f"{TOKEN}+/="),
    token("shopify", "Shopify tokens", "shpat_", "shpca_", "shppa_", "shpss_", least=32, letters="0-9A-Fa-f"),
    token("square", "Square tokens", "sq0atp-", "sq0csp-", least=22),
    token("supabase", "Supabase tokens", "sbp_", "sb_secret_", least=24, before=WORD_START, check="random"),
    token("tavily", "Tavily keys", "tvly-", least=24),
    Family("telegram", "Telegram bot tokens", (":AA",), rf":(AA[{TOKEN}]{{32,64}})", before="[0-9]{8,10}", run=TOKEN,
           check="mixed_case"),
    Family("twilio", "Twilio keys", ("SK",), "SK[0-9A-Fa-f]{32}", before=WORD_START, after="A-Za-z0-9"),
    token("atlassian", "Atlassian tokens", "ATATT3", "ATCTT3", "ATBB", least=24, run=f"{TOKEN}=", before=WORD_START,
          check="mixed_case"),
    token("artifactory", "Artifactory keys", "AKCp", "cmVmd", least=56, letters="A-Za-z0-9", before=WORD_START,
          check="mixed_case"),
    token("age", "age identities", "AGE-SECRET-KEY-1", "AGE-SECRET-KEY-PQ-1", least=40, letters="0-9A-Z"),
    token("onepassword", "1Password service tokens", "ops_eyJ", least=40, letters=f"{TOKEN}+/", run=f"{TOKEN}+/="),
    token(
"other-vendor", "tokens of other services, by their beginnings", "AIK_CI_", "AIK_SECRET_", "API-", "AstraCS:",
        "BSA", "CCDB1_", "CCIPAT_", "CFPAT-", "CLOJARS_", "EZAK", "EZTK", "FLWSECK_", "LTAI", "apify_api_", "apk_",
        "bkps_", "bkua_", "cnvca_", "cog_", "ddp_", "dt0c01.", "dvc_server_", "esecret_", "figd_", "fw_", "glwt-",
        "hf_oauth_", "ico-", "jina_", "key_", "nfp_", "pa-", "phx_", "pnu_", "polar_at_", "polar_oat_", "polar_pat_",
        "prf_cli_", "ramp_sec_", "rdme_", "rnd_", "samsara_api_", "sgp_", "sk-lf-", "sm_aat_", "sm_pat_", "sm_sat_",
        "sqa_", "sqp_", "squ_", "tfp_", "tk-us-", "tskey-", "tss_", "ucat_", "unkey_", "vca_", "vci_", "vck_", "vcp_",
        "vcr_", "vtwn_", "waka_", "xkeysib-", "zpka_",
        least=24, letters=f"{TOKEN}.:", run=f"{TOKEN}.:", before=WORD_START, check="random_token",
    ),
)  # fmt: skip

# --- structures ------------------------------------------------------------------------------------------------------

# Between the lines of a key, in a file, a string with escapes, a quotation, a comment or a diff.
_GAP = r"(?:[\s\"'+,|>#*]|\\{1,4}[nrt\"'])"
_HEADER = r"[A-Z][A-Za-z-]{2,24}: [^\n\r\\\"]{1,80}"  # Proc-Type, DEK-Info, Comment
_PEM: dict[str, Any] = {
    "bridge": rf"{_GAP}{{0,24}}(?:[A-Za-z0-9+/]{{16,100}}={{0,3}}|=[A-Za-z0-9+/]{{4}}"
    rf"|{_HEADER}|[A-Za-z0-9+/]{{1,15}}={{0,2}}{_GAP}{{0,24}}\Z)",
    "last": rf"{_GAP}{{0,24}}[A-Za-z0-9+/]{{0,15}}={{0,3}}{_GAP}{{0,24}}-----?[ ]?END [A-Z0-9 ]{{0,40}}-----?",
}

STRUCTURES = (
    Family(
        "private-key", "PEM, OpenSSH and PGP private keys", ("-----BEGIN ", "---- BEGIN "),
        rf"(?:-----|---- )BEGIN [A-Z0-9 ]{{0,40}}PRIVATE KEY(?: BLOCK)?[ ]?-----?{_GAP}{{1,40}}"
        rf"(?:[A-Za-z0-9+/]{{16}}|{_HEADER})", run=BASE64 + "=", **_PEM,
    ),
    Family(
        "putty-key", "PuTTY private keys", ("Private-Lines: ",),
        rf"Private-Lines: [0-9]{{1,4}}{_GAP}{{1,8}}([A-Za-z0-9+/]{{16}})", run=BASE64 + "=", **_PEM,
    ),
    Family(
        "jwt", "JSON web tokens, signed or encrypted", ("eyJ",), rf"eyJ[{TOKEN}]{{12,380}}[.][{TOKEN}]{{8,64}}",
        before=WORD_START, run=f"{TOKEN}=", bridge=DOTTED + "|[.]{2}[A-Za-z0-9_-]",
    ),
    Family(
        "jwt-long", "JSON web tokens whose header is longer than what is held back", ("eyJ",), rf"eyJ[{TOKEN}]{{400}}",
        before=WORD_START, run=f"{TOKEN}=", bridge=DOTTED + "|[.]{2}[A-Za-z0-9_-]", check="not_data_url",
    ),
    Family(
        "url-password", "passwords in URLs", ("://",),
        r"://[^\s/@:\"'<>]{0,64}:([^\s/@\"'<>]{1,200})@", check="url_password",
    ),
    Family(
        "url-password-long", "passwords in URLs that are longer than what is held back", ("://",),
        r"://[^\s/@:\"'<>\[]{0,64}:([^\s/@\"'<>]{201})", run=r"^\s/@\"'<>",
    ),
    Family(
        "url-token", "tokens in place of the user of a URL", ("://",), r"://([A-Za-z0-9_.~-]{20,128})(?::x-oauth-basic)?@",
        check="random",
    ),
)  # fmt: skip

# --- assignments: the name says that the value is secret -------------------------------------------------------------

STRONG_NAMES = ("password", "passwd", "passphrase", "passcode", "pwd", "_pass", "-pass")
CLEAR_NAMES = tuple(
    f"{first}{between}{second}"
    for first, second in (
        ("api", "key"), ("access", "key"), ("account", "key"), ("private", "key"), ("signing", "key"), ("auth", "key"),
        ("encryption", "key"), ("master", "key"), ("storage", "key"), ("subscription", "key"), ("service", "key"),
        ("deploy", "key"), ("auth", "token"),
    )
    for between in ("_", "-", "", " ")
)  # fmt: skip
NAMES = (*STRONG_NAMES, *CLEAR_NAMES, "secret", "token", "credential")
_NAME = "(?:" + "|".join(NAMES) + ")s?"
_SUFFIX = (
    r"(?:[_ -]?(?:access|api|key|base|token|value|string|prod|production|staging|dev|test|live|old|new|default|primary"
    r"|secondary|[0-9]{1,3})){0,3}"
)
_QUOTE = r"\\{0,3}[\"'`]"
_ANSI = r"(?:\x1b\[[0-9;]{0,11}m)?"
_SIGN = (
    rf"(?:{_QUOTE})?\]?{_ANSI}[ \t]{{0,8}}(?:\[[A-Za-z*. ]{{0,20}}\]:|:[ ]?(?:str|String|string)[ ]?=|:=|={{1,3}}>?|::?"
    rf"|->|&gt;|>|%3[dD]|[ ]is:?[ ])[ \t]{{0,8}}{_ANSI}"
)
_OPEN = rf"(?:[bruf]{{0,2}}{_QUOTE})"
_UNQUOTED = r"^\s\"'`<>\\\x1b"  # characters of a value without quotes
_PLAIN = r"^\s\"'`<>\\\x1b&;,(){}\[\]|"  # of these, what neither separates nor closes
_INNER = _PLAIN + ".:"  # of these, what does not end a sentence
_REST: dict[str, Any] = {
    "run": _INNER,
    "bridge": rf"[.:&;,(){{}}\[\]|]{{1,3}}[{_INNER}]|\\[^\s\"'`\\nrtu][{_INNER}]?",
    "stop": r"(?:[&;,]|&amp;)[ ]?[A-Za-z_][A-Za-z0-9_.-]{0,30}=",
}

ASSIGNMENTS = (
    Family(
        "assignment", "values of names such as password, api_key, secret and token, in quotes", NAMES,
        rf"{_NAME}{_SUFFIX}{_SIGN}{_OPEN}([^\s\"'`\\\x1b]{{4,64}})", ignore_case=True, check="quoted_value",
        run=r"^\s\"'`\\\x1b", bridge=r"\\[^\s\"'`\\nrtu]|\\u[0-9A-Fa-f]{4}",
    ),
    Family(
        "assignment", "values of such names, without quotes", NAMES,
        rf"{_NAME}{_SUFFIX}{_SIGN}([{_UNQUOTED}]{{4,64}})", ignore_case=True, check="plain_value", **_REST,
    ),
    Family(
        "assignment", "values of such options on a command line", NAMES,
        rf"{_NAME}[a-z-]{{0,16}}[ =]{{1,2}}[\"']?([{_UNQUOTED}]{{4,64}})", ignore_case=True, before=FLAG,
        check="plain_value", **_REST,
    ),
    Family(
        "assignment", "passwords in .netrc files", ("login ",),
        rf"login [^\s]{{1,64}}\s{{1,8}}password [\"']?([{_PLAIN}]{{4,64}})", check="quoted_value", **_REST,
    ),
    Family(
        "authorization", "credentials in Authorization headers", ("authorization", "bearer "),
        rf"(?:authorization{_SIGN}(?:{_OPEN})?(?:bearer|basic|token|apikey|key)?[ \t]|bearer[ ])[ \t]{{0,4}}"
        r"([A-Za-z0-9._~+/-]{16,64})", ignore_case=True, run="A-Za-z0-9._~+/=-", check="random",
    ),
    Family(
        "curl-user", "user and password given to curl", ("curl ",),
        r"curl [^\n]{0,80}?(?:-u|--user)[ =]{1,2}[\"']?[^\s:\"']{1,64}:([^\s\"']{4,64})", run=r"^\s\"'",
        check="url_password",
    ),
)  # fmt: skip

# --- encoded: the beginnings that are worth it, in base64, hexadecimal and escapes -----------------------------------

_TOO_SHORT = ("xox", "SK")
ENCODED_BEGINNINGS = (
    *dict.fromkeys(text for family in TOKENS if not family.offset for text in family.anchors if text not in _TOO_SHORT),
    "xoxb-", "xoxp-", "xoxa-", "xoxr-", "xoxs-", "xoxo-", "xoxe", "eyJhbGci", "eyJ0eXAi", "BEGIN RSA PRIVATE KEY",
    "BEGIN PRIVATE KEY", "BEGIN EC PRIVATE KEY", "BEGIN OPENSSH PRIVATE KEY", "BEGIN ENCRYPTED PRIVATE KEY",
)  # fmt: skip
LEAST_INSIDE = 5  # letters of base64 that are looked for inside of a longer text; fewer turn up in it by chance


def _in_base64(text: str, shift: int) -> str:
    """The letters of base64 that stand for `text` and nothing else, where `shift` bytes (modulo 3) are before it."""
    encoded = base64.b64encode(b"\0" * shift + text.encode()).decode()
    return encoded[-(-8 * shift // 6) : 8 * (shift + len(text)) // 6]


def _encoded() -> Iterator[Family]:
    at_start = [_in_base64(text, 0) for text in ENCODED_BEGINNINGS]
    inside = [_in_base64(text, shift) for text in ENCODED_BEGINNINGS for shift in range(3)]
    for anchors, before, where in (
        ([text for text in inside if len(text) >= LEAST_INSIDE], "", ""),
        (at_start, BASE64_START, ", where it begins"),
    ):
        anchors = list(dict.fromkeys(anchors))
        either = "|".join(anchor.replace("+", "[+]") for anchor in anchors)
        yield Family(
            "encoded",
            f"the beginnings of tokens and keys in base64{where}",
            tuple(anchors),
            f"(?:{either})[{BASE64}_-]{{20}}",
            before=before,
            run=f"{BASE64}_=-",
        )
    for first, between, least in (("", "", 16), (r"\x", r"\\{1,2}x", 4), (r"\u00", r"\\{1,2}u00", 8), ("%", "%", 8)):
        texts = [[f"{byte:02x}" for byte in text.encode()] for text in ENCODED_BEGINNINGS]
        wholes = ["".join(pairs) for pairs in texts]
        beginning = "|".join(first.replace("\\", r"\\") + between.join(pairs) for pairs in texts)
        yield Family(
            "encoded",
            f"the same in hexadecimal, each byte as {first}hh",
            tuple(dict.fromkeys(first + pairs[0] for pairs in texts)) if first else tuple(wholes),
            f"(?:{beginning})(?:{between}[0-9a-f]{{2}}){{{least}}}",
            ignore_case=True,
            before="" if first else WORD_START,
            run="0-9a-fA-F" + (r"\\xu%A-Za-z_-" if first else ""),
        )


SECRETS = (*TOKENS, *STRUCTURES, *ASSIGNMENTS, *_encoded())

# --- personal data: off unless asked for -----------------------------------------------------------------------------

PERSONAL = (
    Family(
        "email", "e-mail addresses", (),
        r"[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})\.){1,4}[A-Za-z]{2,24}",
    ),
    Family(
        "iban", "bank accounts (IBAN), by length and check digits", (),
        r"[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]){11,30}", before=WORD_START, after="A-Za-z0-9", check="iban",
    ),
    Family(
        "card", "payment cards, by length and check digit", (), r"[3-6][0-9](?:[ -]?[0-9]){11,17}",
        before=r"\A|[^A-Za-z0-9.]|[^0-9]\.", after="A-Za-z0-9", check="card",
    ),
    Family(
        "us-ssn", "US social security numbers", (), r"[0-8][0-9]{2}-[0-9]{2}-[0-9]{4}", before=r"\A|[^A-Za-z0-9-]",
        after="A-Za-z0-9-", check="us_ssn",
    ),
    Family(
        "phone", "telephone numbers, international or in US form", (),
        r"\+[1-9][0-9]?(?:[ ().-]{0,2}[0-9]){7,13}|\([2-9][0-9]{2}\) ?[2-9][0-9]{2}[-. ][0-9]{4}"
        r"|[2-9][0-9]{2}[-.][2-9][0-9]{2}[-.][0-9]{4}", before=r"\A|[^A-Za-z0-9.+-]|[^0-9][.-]", after="A-Za-z0-9",
    ),
    Family(
        "ip-address", "IP addresses of hosts, not those of a computer to itself", (),
        r"[0-9]{1,3}(?:\.[0-9]{1,3}){3,6}|(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}", before=r"\A|[^A-Za-z0-9.:]",
        after="A-Za-z0-9", check="ip_address",
    ),
)  # fmt: skip
