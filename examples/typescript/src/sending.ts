/** An event as it waits, and how the broker is asked to store it. */

import { JetStreamApiError, type JetStreamClient } from "@nats-io/jetstream";
import { errors, headers } from "@nats-io/transport-node";

import { PACKED, TRIED, type Packed, type Spooled } from "./spool.js";

// The broker's own words for "this message can never be stored": too large for the stream or the account.
const NEVER = [10054, 10040];

export interface Waiting {
  id: string;
  json: string;
  sizeBytes: number;
  tries: number;
  data?: Uint8Array; // as it goes over the wire: without secrets, and zipped where it is long
  zipped?: boolean;
}

export function ofSpool({ id, data, flags }: Spooled): Waiting {
  return { id, json: "", sizeBytes: data.length, tries: flags & TRIED ? 1 : 0, data, zipped: (flags & PACKED) !== 0 };
}

export function forSpool({ id, data, tries, zipped }: Waiting): Packed {
  return { id, data: data!, flags: (tries > 0 ? TRIED : 0) | (zipped ? PACKED : 0) };
}

/** Wait for the broker's word that it has the event. Throws why it has not: `isForLater` says whether to try again. */
export async function send(js: JetStreamClient, subject: string, item: Waiting): Promise<void> {
  const first = item.tries === 0;
  item.tries += 1;
  const ack = await js.publish(subject, item.data!, { msgID: item.id, headers: headersOf(item) });
  // Somebody else's event bears this id, and ours was not stored. The recorder knows an event by its event id.
  if (ack.duplicate && first) await js.publish(subject, item.data!, { headers: headersOf(item) });
}

export class NotWritableError extends Error {}

/** Made anew for each publish: the client writes the message id into them. */
function headersOf(item: Waiting) {
  const made = headers();
  if (item.zipped) made.set("Content-Encoding", "gzip");
  return made;
}

export function isForLater(result: PromiseSettledResult<void>): result is PromiseRejectedResult {
  return result.status === "rejected" && !isForGood(result.reason);
}

export function throwFirst(results: PromiseSettledResult<void>[]): void {
  const first = results.find(isForLater);
  if (first) throw first.reason;
}

function isForGood(error: unknown): boolean {
  return (
    error instanceof NotWritableError ||
    error instanceof errors.InvalidArgumentError ||
    (error instanceof JetStreamApiError && NEVER.includes(error.code))
  );
}
