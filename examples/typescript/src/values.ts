/** Ids, values as JSON can carry them, and errors in words. */

import { randomBytes } from "node:crypto";

/** A time-ordered id (RFC 9562, version 7): 48 bits of milliseconds, then 74 random bits. */
export function uuid7(): string {
  const bytes = randomBytes(16);
  bytes.writeUIntBE(Date.now(), 0, 6);
  bytes[6] = (bytes[6]! & 0x0f) | 0x70;
  bytes[8] = (bytes[8]! & 0x3f) | 0x80;
  return bytes.toString("hex").replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-");
}

/** Half a surrogate pair, as cut streams leave it: JSON writes it as an escape, and the recorder refuses it. */
const HALF_A_PAIR = /(?<!\\)((?:\\\\)*)\\ud[89a-f][0-9a-f]{2}/g;

/**
 * JSON of an event, or of a part of one. What JSON cannot hold is marked, and never made null or left out: a number that is
 * none, or infinite, is the text "NaN", "Infinity" or "-Infinity", and half a surrogate pair is U+FFFD.
 */
export function encoded(value: unknown): string {
  const json = value === undefined || typeof value === "function" ? undefined : JSON.stringify(value, marked);
  if (json === undefined) throw new TypeError("JSON has no word for it");
  return json.replace(HALF_A_PAIR, "$1\ufffd");
}

function marked(this: unknown, name: string, value: unknown): unknown {
  switch (typeof value) {
    case "bigint":
      return String(value);
    case "number":
      return Number.isFinite(value) ? value : String(value);
    case "function":
    case "symbol":
      return `<${typeof value}>`;
  }
  if (value === null && (this as Record<string, unknown>)[name] instanceof Date) return "Invalid Date";
  if (value instanceof Map) return toldApart([...value].map(([key, inner]) => [String(key), inner]));
  if (value instanceof Set) return [...value];
  return value instanceof Error ? words(value) : value;
}

/** An object of these fields. Names that have become the same are numbered: no field takes another's place. */
export function toldApart(fields: [name: string, value: unknown][]): Record<string, unknown> {
  const found: Record<string, unknown> = {};
  for (const [name, value] of fields) {
    let free = name;
    for (let number = 2; Object.hasOwn(found, free); number += 1) free = `${name} (${number})`;
    found[free] = value;
  }
  return found;
}

export function words(error: unknown): string {
  return error instanceof Error ? `${error.name}: ${error.message}` : String(error);
}
