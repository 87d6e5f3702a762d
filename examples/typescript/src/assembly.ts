/**
 * A streamed chat completion put together again: chunks in, one completion out, as the Python SDK does it
 * (`ratchet_sdk/assembly.py`, and both pass the cases of tests/sdk/streamed.json).
 *
 * What a chunk brings of a message goes on with what came before: strings are joined, objects merged by field, lists joined,
 * their items by `index` where they have one. Null says nothing. What only says what something is (an id, a type, a name) is
 * not glued where each chunk repeats it. A tool call with a new id is a new call, whatever its index.
 */

type Json = { [name: string]: unknown };

const LABELS = ["role", "id", "type", "index", "format"]; // of these the last one counts
const IDENTITY = ["index", "id", "type"]; // two items that differ in one of these are two

/** A stream's chunks, put together as the completion that was not streamed. Whatever a chunk holds, it throws nothing. */
export class StreamedReply {
  readonly #head: Json = { object: "chat.completion" };
  readonly #choices = new Map<number, StreamedChoice>();

  add(chunk: object): void {
    const { object: _, choices, ...head } = chunk as Json;
    for (const [name, value] of Object.entries(head)) if (value != null) this.#head[name] = value;
    for (const choice of Array.isArray(choices) ? choices.filter(isObject) : []) {
      const index = indexOf(choice) ?? 0;
      if (!this.#choices.has(index)) this.#choices.set(index, new StreamedChoice(index));
      this.#choices.get(index)!.add(choice);
    }
  }

  /** A completion as far as it came: `finish_reason` is null where the stream was cut. Nothing of no chunk. */
  completion(): Json | undefined {
    const choices = [...this.#choices].sort(([one], [other]) => one - other).map(([, choice]) => choice.whole());
    return choices.length > 0 ? { ...this.#head, choices } : undefined;
  }
}

/** One choice: its message grows by deltas. Beside it lists are joined (token ids), and of texts the last counts. */
class StreamedChoice {
  readonly #message: Json = {};
  readonly #beside: Json = {};

  constructor(readonly index: number) {}

  add({ delta, message, index: _, ...beside }: Json): void {
    const said = isUnsaid(delta) ? message : delta; // one event may bring it all
    const told = Object.entries(isObject(said) ? said : {}).filter(([, value]) => !(Array.isArray(value) && isUnsaid(value)));
    merged(this.#message, Object.fromEntries(told));
    merged(this.#beside, beside, "", false);
  }

  whole(): Json {
    const message: Json = { role: "assistant", content: null, ...this.#message };
    if (Array.isArray(message.tool_calls)) message.tool_calls = message.tool_calls.map(wholeCall);
    const beside = Object.entries(this.#beside).filter(([, value]) => !isUnsaid(value));
    return { finish_reason: null, ...Object.fromEntries(beside), index: this.index, message };
  }
}

function wholeCall(call: unknown): unknown {
  if (!isObject(call)) return call;
  const { index: _, ...said } = call;
  return "function" in call ? { type: "function", ...said } : said;
}

/**
 * What the field `name` holds once `fresh` has come. `known` may grow in place; `fresh` stays as it is. `texts`: whether
 * strings are parts of a text. Kinds that do not fit each other stand in a list.
 */
function merged(known: unknown, fresh: unknown, name = "", texts = true): unknown {
  if (isUnsaid(fresh) && known != null) return known;
  if (LABELS.includes(name) || (isUnsaid(known) && kindOf(known) !== kindOf(fresh))) {
    known = isObject(fresh) ? {} : Array.isArray(fresh) ? [] : undefined;
  }
  if (known == null) return fresh;
  if (isObject(known) && isObject(fresh)) {
    for (const [field, value] of Object.entries(fresh)) {
      if (value != null) known[field] = merged(known[field], value, field, texts);
    }
    return known;
  }
  if (Array.isArray(known) && Array.isArray(fresh)) {
    for (const part of fresh) addItem(known, part, name);
    return known;
  }
  if (typeof known === "string" && typeof fresh === "string") {
    return texts && !(name === "name" && known === fresh) ? known + fresh : fresh;
  }
  if (kindOf(known) === kindOf(fresh)) return fresh;
  return [...listed(known, name), ...listed(fresh, name)];
}

function listed(value: unknown, name: string): unknown[] {
  if (typeof value === "string" && name === "content") return [{ type: "text", text: value }];
  return Array.isArray(value) ? value : [value];
}

/** Go on with the item that `part` belongs to, or begin one, before those of a higher index. */
function addItem(items: unknown[], part: unknown, name: string): void {
  const index = indexOf(part);
  if (!isObject(part) || !(name === "tool_calls" || index !== undefined)) {
    items.push(part);
    return;
  }
  const continues = name === "tool_calls" ? continuesCall : continuesItem;
  const known = items.filter(isObject).reverse().find((item) => continues(item, part));
  if (known !== undefined) {
    merged(known, part);
    return;
  }
  const after = items.findIndex((item) => index !== undefined && (indexOf(item) ?? 0) > index);
  items.splice(after === -1 ? items.length : after, 0, merged({}, part));
}

function continuesItem(item: Json, part: Json): boolean {
  return indexOf(item) === indexOf(part) && !differ(item, part);
}

function differ(item: Json, part: Json): boolean {
  return IDENTITY.some((name) => !isUnsaid(item[name]) && !isUnsaid(part[name]) && item[name] !== part[name]);
}

/**
 * Servers leave out the index, the id or both, or count each call as the first. Then a function that is named once the call
 * before has its arguments is a call of its own.
 */
function continuesCall(call: Json, part: Json): boolean {
  if (differ(call, part)) return false;
  const [known, held] = asked(call);
  const [named, more] = asked(part);
  if (part.id || !named || !known) return true;
  if (named === known) return !(more && isWhole(held));
  return !held && indexOf(part) !== undefined; // the next piece of its name
}

/** The name and the arguments of what a call, or a part of one, asks for. */
function asked(call: Json): [name: unknown, held: unknown] {
  const body = [call.function, call.custom].find(isObject) ?? {};
  return [body.name, body.arguments || body.input];
}

function isWhole(held: unknown): boolean {
  if (typeof held !== "string") return Boolean(held);
  if (!held.trimEnd().endsWith("}")) return false;
  try {
    return isObject(JSON.parse(held));
  } catch {
    return false;
  }
}

function isObject(value: unknown): value is Json {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function isUnsaid(value: unknown): boolean {
  if (Array.isArray(value)) return value.length === 0;
  return value == null || value === "" || (isObject(value) && Object.keys(value).length === 0);
}

function kindOf(value: unknown): string {
  return Array.isArray(value) ? "array" : typeof value;
}

function indexOf(item: unknown): number | undefined {
  const index = isObject(item) ? item.index : undefined;
  return typeof index === "number" ? index : undefined;
}
