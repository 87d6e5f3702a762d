/** What is recorded of a model call: the reply's parts, and the conversation that a later call may extend. */

import { isDeepStrictEqual } from "node:util";

import type * as wire from "./events.js";

type Json = Record<string, unknown>;
export type Message = NonNullable<wire.LlmCall["messages"]>[number];

export const NUMBERS = ["temperature", "top_p", "max_tokens", "seed", "latency_ms"] as const; // as a call may hold them

/** What a call's record holds: its prompt and its reply. `lost`: how many events were lost until then. */
export interface Conversation {
  call_id: string;
  messages: Message[];
  lost: number;
}

export function begins(known: Conversation, messages: Message[]): boolean {
  return (
    known.messages.length < messages.length &&
    known.messages.every((message, n) => isDeepStrictEqual(bare(message), bare(messages[n]!)))
  );
}

function bare(message: Message): Json {
  return Object.fromEntries(Object.entries(message).filter(([, value]) => value !== null));
}

/** What a reply says about its call: the choice, and of a whole completion also model, usage and token ids. */
export function replyFields(response: string | object | undefined): Partial<wire.LlmCall> {
  if (response === undefined) return {};
  if (typeof response === "string") {
    return { response: { finish_reason: "stop", message: { role: "assistant", content: response } } };
  }
  const { choices, model, usage, prompt_token_ids } = response as Json;
  if (!Array.isArray(choices)) return { response: response as Json };
  const other_choices = choices.length > 1 ? choices.slice(1) : undefined;
  const said = { response: choices[0], model_version: model, usage, prompt_token_ids, other_choices };
  return Object.fromEntries(Object.entries(said).filter(([, value]) => value != null));
}
