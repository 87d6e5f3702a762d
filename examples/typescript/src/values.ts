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

export function encoded(value: unknown): string {
  const json = JSON.stringify(value, (_, inner) => (typeof inner === "bigint" ? String(inner) : inner));
  if (json === undefined) throw new TypeError("JSON has no word for it");
  return json.replace(HALF_A_PAIR, "$1?");
}

export function words(error: unknown): string {
  return error instanceof Error ? `${error.name}: ${error.message}` : String(error);
}
