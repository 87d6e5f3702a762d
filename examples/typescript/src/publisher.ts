/**
 * Events on their way to the broker: a bounded queue, and one loop that publishes while there is something in it.
 * Nothing here throws into the agent: what cannot be sent is counted, said once in words, and told by `flush` and `close`.
 */

import { readFileSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { promisify } from "node:util";
import { gzip } from "node:zlib";

import { jetstream, JetStreamApiError, type JetStreamClient } from "@nats-io/jetstream";
import {
  connect,
  credsAuthenticator,
  errors,
  headers,
  nkeyAuthenticator,
  type Authenticator,
  type NatsConnection,
  type NodeConnectionOptions,
} from "@nats-io/transport-node";

import { Redaction, type Redactor } from "./redact.js";

const MAX_EVENT_BYTES = 4 * 1024 * 1024;
const GZIP_ABOVE_BYTES = 32 * 1024;
const QUEUE_MAX_BYTES = 64 * 1024 * 1024;
const IN_FLIGHT = 256;
const IN_FLIGHT_BYTES = 8 * 1024 * 1024;
const CONNECT_TIMEOUT_MS = 2_000;
const ACK_TIMEOUT_MS = 10_000; // a broker that syncs to disk for every message may take seconds under load
const MIN_PAUSE_MS = 50;
const MAX_PAUSE_MS = 2_000;
// The broker's own words for "this message can never be stored": too large for the stream or the account.
const NEVER = [10054, 10040];

/** What became of the events. `unsent` are still on their way; `refused` and `dropped` never left. */
export interface Counts {
  published: number;
  /** Too large, no JSON, or not to be stored: sending it again cannot help. */
  refused: number;
  /** The queue was full, or the recorder closed. */
  dropped: number;
  unsent: number;
  lastError?: string;
}

interface Waiting {
  id: string;
  json: string;
  sizeBytes: number;
  tries: number;
  data?: Uint8Array; // as it goes over the wire: without secrets, and zipped where it is long
  zipped?: boolean;
}

/**
 * What the client asks for beside the servers, which it would not look for in a URL: user and password, TLS.
 * `natsUrl` may name several servers, with commas between them. `credentials` is a file with an nkey seed, alone or with
 * a user's JWT; what stands in the URL before the @ does not count then.
 */
export function connectionOptions(natsUrl: string, credentials?: string): NodeConnectionOptions {
  const urls = natsUrl.split(",").map((url) => new URL(url.includes("://") ? url : `nats://${url}`));
  const options: NodeConnectionOptions = { servers: urls.map((url) => url.host) };
  if (urls.some((url) => url.protocol === "tls:")) options.tls = {};
  const named = urls.find((url) => url.username !== "");
  if (credentials) {
    options.authenticator = authenticatorOf(readFileSync(credentials, "utf8"));
  } else if (named) {
    options.user = decodeURIComponent(named.username);
    options.pass = decodeURIComponent(named.password);
  }
  return options;
}

function authenticatorOf(credentials: string): Authenticator {
  const bytes = new TextEncoder();
  if (credentials.includes("BEGIN NATS USER JWT")) return credsAuthenticator(bytes.encode(credentials));
  const seed = credentials.match(/\bSU[A-Z2-7]{56}\b/)?.[0];
  if (seed === undefined) throw new TypeError("the credentials hold neither a user's JWT nor an nkey seed (SU...)");
  return nkeyAuthenticator(bytes.encode(seed));
}

export function words(error: unknown): string {
  return error instanceof Error ? `${error.name}: ${error.message}` : String(error);
}

export class Publisher {
  readonly counts: Counts = { published: 0, refused: 0, dropped: 0, unsent: 0 };
  readonly #options: NodeConnectionOptions;
  readonly #queue: Waiting[] = [];
  readonly #closing = new AbortController();
  readonly #redaction: Redaction;
  #queueBytes = 0;
  #said: string | undefined; // in the log, since something was stored
  #loop: Promise<void> | undefined;
  #connection: NatsConnection | undefined;

  constructor(
    readonly subject: string,
    options: NodeConnectionOptions,
    private readonly queueMax: number,
    private readonly log: (message: string) => void,
    redactor?: Redactor,
  ) {
    this.#redaction = new Redaction(redactor);
    // One thing connects again, and that is the loop: what a lost connection carried fails at once and is sent again.
    this.#options = { timeout: CONNECT_TIMEOUT_MS, pingInterval: 5_000, maxPingOut: 3, ...options, reconnect: false };
  }

  /** Queue one event. False where it is too large or the queue is full: counted, never thrown. */
  offer(id: string, json: string): boolean {
    const sizeBytes = Buffer.byteLength(json);
    if (sizeBytes > MAX_EVENT_BYTES) {
      return this.refuse(`an event of ${sizeBytes} bytes is over the limit of ${MAX_EVENT_BYTES}; send less of it`);
    }
    const closed = this.#closing.signal.aborted;
    if (closed || this.#queue.length >= this.queueMax || this.#queueBytes > QUEUE_MAX_BYTES) {
      this.counts.dropped += 1;
      const why = closed ? "the recorder is closed" : `${this.#queue.length} events wait unsent already`;
      return this.#fault(`an event was dropped: ${why}`);
    }
    this.#queue.push({ id, json, sizeBytes, tries: 0 });
    this.#queueBytes += sizeBytes;
    this.counts.unsent += 1;
    this.#loop ??= this.#run();
    return true;
  }

  refuse(why: string): false {
    this.counts.refused += 1;
    return this.#fault(why);
  }

  /** Wait until everything that was offered is acknowledged, at most `timeoutMs`. Gives how many events are not. */
  async flush(timeoutMs: number): Promise<number> {
    const patience = new AbortController();
    const late = sleep(timeoutMs, undefined, { signal: patience.signal }).catch(() => undefined);
    await Promise.race([this.#loop, late]);
    patience.abort(); // a timer that is left would keep the process alive
    return this.counts.unsent;
  }

  /** Flush, then stop and disconnect. Gives how many events are not acknowledged: they are lost. */
  async close(timeoutMs: number): Promise<number> {
    const unsent = await this.flush(timeoutMs);
    this.#closing.abort();
    await this.#connection?.close().catch(() => undefined);
    if (unsent) this.log(`ratchet: closed with ${unsent} events unsent; the last error was: ${this.counts.lastError}`);
    return unsent;
  }

  async #run(): Promise<void> {
    let pauseMs = MIN_PAUSE_MS;
    while (this.#queue.length > 0 && !this.#closing.signal.aborted) {
      try {
        await this.#publish(await this.#connected());
        this.#said = undefined;
        pauseMs = MIN_PAUSE_MS;
      } catch (error) {
        this.#fault(`the broker did not take an event yet: ${words(error)}`);
        await sleep(pauseMs, undefined, { signal: this.#closing.signal }).catch(() => undefined);
        pauseMs = Math.min(MAX_PAUSE_MS, 2 * pauseMs);
      }
    }
    this.#loop = undefined;
  }

  async #connected(): Promise<JetStreamClient> {
    if (this.#connection === undefined || this.#connection.isClosed()) {
      const connection = await connect(this.#options);
      this.#connection = connection;
      if (this.#closing.signal.aborted) await connection.close(); // it was closed while this connected
    }
    return jetstream(this.#connection, { timeout: ACK_TIMEOUT_MS });
  }

  /** Publish what waits, up to a window, and settle each by its ack. Throws the first thing worth a pause. */
  async #publish(js: JetStreamClient): Promise<void> {
    const window = this.#nextWindow();
    const ready = await Promise.allSettled(window.map((item) => this.#pack(item)));
    const results = await Promise.allSettled(
      ready.map(async (result, place) => {
        if (result.status === "rejected") throw new NotWritableError(`its redactor threw ${words(result.reason)}`);
        await this.#send(js, window[place]!);
      }),
    );
    const again: Waiting[] = [];
    let fault: unknown;
    results.forEach((result, place) => {
      const item = window[place]!;
      if (result.status === "rejected" && !isForGood(result.reason)) {
        again.push(item); // first of the next window, under the same id
        fault ??= result.reason;
        return;
      }
      this.counts.unsent -= 1;
      this.#queueBytes -= item.sizeBytes;
      if (result.status === "fulfilled") this.counts.published += 1;
      else this.refuse(`an event was refused: ${words(result.reason)}`);
    });
    this.#queue.splice(0, window.length, ...again);
    if (fault !== undefined) throw fault;
  }

  #nextWindow(): Waiting[] {
    let sizeBytes = 0;
    const fits = (item: Waiting) => (sizeBytes += item.sizeBytes) <= IN_FLIGHT_BYTES;
    const end = this.#queue.slice(0, IN_FLIGHT).findIndex((item) => !fits(item));
    return this.#queue.slice(0, end === -1 ? IN_FLIGHT : end);
  }

  /** Off the agent's path, in the order of the events, once for each: tries send the same bytes. */
  async #pack(item: Waiting): Promise<void> {
    if (item.data !== undefined) return;
    const data = new TextEncoder().encode(this.#redaction.of(item.json));
    item.zipped = data.length > GZIP_ABOVE_BYTES;
    item.data = item.zipped ? await promisify(gzip)(data, { level: 1 }) : data;
    item.json = "";
  }

  async #send(js: JetStreamClient, item: Waiting): Promise<void> {
    const first = item.tries === 0;
    item.tries += 1;
    const ack = await js.publish(this.subject, item.data!, { msgID: item.id, headers: headersOf(item) });
    // Somebody else's event bears this id, and ours was not stored. The recorder knows an event by its event id.
    if (ack.duplicate && first) await js.publish(this.subject, item.data!, { headers: headersOf(item) });
  }

  #fault(why: string): false {
    if (why !== this.#said) this.log(`ratchet: ${why}`);
    this.#said = this.counts.lastError = why;
    return false;
  }
}

class NotWritableError extends Error {}

/** Made anew for each publish: the client writes the message id into them. */
function headersOf(item: Waiting) {
  const made = headers();
  if (item.zipped) made.set("Content-Encoding", "gzip");
  return made;
}

function isForGood(error: unknown): boolean {
  return (
    error instanceof NotWritableError ||
    error instanceof errors.InvalidArgumentError ||
    (error instanceof JetStreamApiError && NEVER.includes(error.code))
  );
}
