/**
 * Secrets taken out of events before they leave. What stands in the place of a secret says what kind it was; ids, times and
 * structure stay, so that an event keeps its place in its run, and a number in a field of ids is no card's. The rules are those of the Python SDK, and one test holds
 * both to the same samples. This is a net with a mesh, not a proof: give `Recorder` a function for what is yours alone.
 */

import { toldApart } from "./values.js";

export type Redactor = (text: string) => string;

type Json = { [name: string]: unknown };

/** What places an event and a call: never text of an agent's. Elsewhere the same names are ordinary fields. */
const KEPT = ["schema", "event_id", "kind", "policy", "trajectory_id", "started_at", "occurred_at"];
const KEPT_OF_CALLS = ["call_id", "base_call_id"];
const CALLS = ["call", "llm_calls"];

/** The name of a field of ids: `id`, `tool_call_id`, `order_ids`, `orderId`. */
const IDS = /(?:^|[_-])(?:id|Id|ID)s?$|[a-z0-9]I[dD]s?$/;

/** In the name of what holds a password or the like. */
const TELLING = /api[_-]?key|secret|passw|(?:access|auth|refresh)[_-]?token/i;

/** Formats as their issuers publish them: OpenAI, Anthropic; AWS; GitHub; GitLab; Hugging Face; Google; Slack; Stripe. */
const KEY = [
  /sk-(?:ant-|proj-)?[A-Za-z0-9_-]{16,}/,
  /A[KS]IA[0-9A-Z]{16}(?![0-9A-Za-z])/,
  /gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,}/,
  /glpat-[\w-]{20,}|hf_[A-Za-z0-9]{30,}/,
  /AIza[\w-]{35}|ya29\.[\w-]{20,}/,
  /xox[abeoprs]-[A-Za-z0-9-]{10,}/,
  /[sr]k_(?:live|test)_[A-Za-z0-9]{16,}/,
];
const BEGIN = "-----BEGIN (?:[A-Z]{1,20} ){0,3}PRIVATE KEY-----";
const END = "-----END (?:[A-Z]{1,20} ){0,3}PRIVATE KEY-----";
const PASSWORD_NAMES = "api[_-]?key|secret(?:[_-](?:access[_-])?key)?|password|passwd|(?:access|auth|refresh)[_-]?token";

const KINDS: [kind: string, expression: RegExp][] = [
  ["key", new RegExp(`(?<![A-Za-z0-9])(?:${KEY.map((one) => one.source).join("|")})`, "g")],
  ["key", new RegExp(`${BEGIN}[A-Za-z0-9+/=\\s\\\\]{0,20000}(?:${END})?`, "g")],
  ["token", /(?<![\w-])eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{4,}/g],
  ["token", /\b(?:bearer|basic) {1,9}[a-z0-9._~+/=-]{12,}/gi],
  ["password", /(?<=:\/\/)[^\s:/@"']{0,100}:[^\s/@"']{1,200}(?=@)/g],
  [
    "password",
    new RegExp(
      `\\b(?:[a-z0-9]{1,20}[_-]){0,3}(?:${PASSWORD_NAMES})\\b["']?\\s{0,3}[:=]\\s{0,3}(?!\\[)["']?[^\\s"',;&[]{6,200}`,
      "gi",
    ),
  ],
];
const DOMAIN = /@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,8}/g;
const BEFORE_AT = /[\p{L}\p{N}._%+-]/u;
const CARD = /\d{4}(?:\d{9,15}|([ -])(?:\d{4}\1\d{4}\1\d{1,7}|\d{6}\1\d{4,5})(?!\d))/g; // as they are printed
const TOUCHED_RUNS = 10_000;

/** `text` with keys, tokens, passwords, e-mail addresses and card numbers replaced by `[kind]`. */
export function secrets(text: string): string {
  return inIds(text).replace(CARD, card);
}

/** As `secrets`, but for card numbers: one id in ten of that length passes for one. */
function inIds(text: string): string {
  for (const [kind, expression] of KINDS) text = text.replace(expression, `[${kind}]`);
  return withoutAddresses(text);
}

/** From each @ with a domain backwards: an expression would try every place where an address could begin. */
function withoutAddresses(text: string): string {
  let clean = "";
  let done = 0;
  for (const domain of text.matchAll(DOMAIN)) {
    const at = domain.index!;
    let start = at;
    while (start > Math.max(done, at - 64) && BEFORE_AT.test(text[start - 1]!)) start -= 1;
    if (start === at) continue;
    clean += `${text.slice(done, start)}[email]`;
    done = at + domain[0].length;
  }
  return clean + text.slice(done);
}

/** 13 to 19 digits whose Luhn sum is divisible by ten; not one digit all along, no part of a number or hash. */
function card(match: string, _joint: string | undefined, start: number, text: string): string {
  const digits = [...match].filter((c) => c >= "0" && c <= "9").map(Number);
  const sum = digits.reverse().reduce((sum, d, place) => sum + (place % 2 === 0 ? d : 2 * d - (d > 4 ? 9 : 0)), 0);
  const before = text.slice(Math.max(0, start - 1), start);
  const after = text.slice(start + match.length, start + match.length + 1);
  const whole = !/[\p{L}\p{N}.-]/u.test(before) && !/[\p{L}\p{N}]/u.test(after);
  return whole && new Set(digits).size > 1 && sum % 10 === 0 ? "[card]" : match;
}

/**
 * One agent's events, in their order, each text in them passed through a redactor; names of fields are texts too.
 *
 * Tokens spell a text out once more, and a prompt's tokens those of all calls before it: from the first call of a run in
 * which something was replaced, its calls lose their token ids and logprobs, and say so (`tokens_redacted`).
 */
export class Redaction {
  readonly #redactor: Redactor | undefined;
  readonly #touched = new Set<unknown>(); // runs with a call in which something was replaced

  constructor(redactor: Redactor | undefined) {
    this.#redactor = redactor;
  }

  /** An event's JSON without secrets. Throws whatever the redactor throws. */
  of(json: string): string {
    const redactor = this.#redactor;
    if (redactor === undefined) return json;
    const event = JSON.parse(json) as Json;
    const clean = Object.fromEntries(
      Object.entries(event).map(([name, value]) => [
        name,
        KEPT.includes(name) ? value : walk(value, redactorOf(name, value, redactor), name),
      ]),
    );
    const calls = callsOf(clean);
    if (JSON.stringify(calls) !== JSON.stringify(callsOf(event))) this.#touch(event.trajectory_id);
    if (this.#touched.has(event.trajectory_id)) calls.forEach(withoutTokens);
    return JSON.stringify(clean);
  }

  #touch(trajectoryId: unknown): void {
    this.#touched.add(trajectoryId);
    if (this.#touched.size > TOUCHED_RUNS) this.#touched.delete(this.#touched.values().next().value);
  }
}

function isObject(value: unknown): value is Json {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function callsOf(event: Json): Json[] {
  const several = Array.isArray(event.llm_calls) ? event.llm_calls : [];
  return [event.call, ...several].filter(isObject);
}

function withoutTokens(call: Json): void {
  const others = Array.isArray(call.other_choices) ? call.other_choices : [];
  const choices = [call.response, ...others].filter(isObject);
  const tokens = [call.prompt_token_ids, ...choices.flatMap((choice) => [choice.token_ids, choice.logprobs])];
  delete call.prompt_token_ids;
  for (const choice of choices) {
    delete choice.token_ids;
    delete choice.logprobs;
  }
  if (tokens.some((token) => token != null)) call.tokens_redacted = true;
}

/** `top`: the event's own field that this is. */
function walk(value: unknown, redactor: Redactor, top = ""): unknown {
  if (typeof value === "string") return redactor(value);
  if (Array.isArray(value)) return value.map((item) => walk(item, redactor, top === "llm_calls" ? top : ""));
  if (!isObject(value)) return value;
  const kept = CALLS.includes(top) ? KEPT_OF_CALLS : [];
  const fields = Object.entries(value).map(([name, inner]): [string, unknown] => [
    redactor(name),
    kept.includes(name) ? inner : named(name, inner, redactor),
  ]);
  return toldApart(fields);
}

/** What looks at the texts of a field: where they are ids, not for card numbers. */
function redactorOf(name: string, value: unknown, redactor: Redactor): Redactor {
  const texts = Array.isArray(value) ? value : [value];
  const areIds = redactor === secrets && IDS.test(name) && texts.every((text) => typeof text === "string");
  return areIds ? inIds : redactor;
}

/** A field's value. `{"password": "..."}` is one secret in two texts, of which neither shows it alone. */
function named(name: string, value: unknown, redactor: Redactor): unknown {
  const clean = walk(value, redactorOf(name, value, redactor));
  if (redactor !== secrets || typeof value !== "string" || clean !== value || !TELLING.test(name)) return clean;
  const together = `${name}=${value}`;
  return secrets(together) === together ? value : "[password]";
}
