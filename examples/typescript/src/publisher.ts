/**
 * Events on their way to the broker: a bounded queue, a spool on disk, and one loop that publishes while there is something
 * in either. While the broker is away the queue goes to the spool, which outlives the process and is sent before anything
 * newer. Nothing here throws into the agent: what cannot be sent is counted, said once in words, and told by `flush` and
 * `close`.
 */

import { existsSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { promisify } from "node:util";
import { gzip } from "node:zlib";

import { jetstream, type JetStreamClient } from "@nats-io/jetstream";
import { connect, type NatsConnection, type NodeConnectionOptions } from "@nats-io/transport-node";

import { Redaction, type Redactor } from "./redact.js";
import { forSpool, isForLater, NotWritableError, ofSpool, send, throwFirst, type Waiting } from "./sending.js";
import type { Spool, Spooled } from "./spool.js";
import { words } from "./values.js";

const MAX_EVENT_BYTES = 4 * 1024 * 1024;
const GZIP_ABOVE_BYTES = 32 * 1024;
const QUEUE_MAX_BYTES = 64 * 1024 * 1024;
const IN_FLIGHT = 256;
const IN_FLIGHT_BYTES = 8 * 1024 * 1024;
const CONNECT_TIMEOUT_MS = 2_000;
const ACK_TIMEOUT_MS = 10_000; // a broker that syncs to disk for every message may take seconds under load
const MIN_PAUSE_MS = 50;
const MAX_PAUSE_MS = 2_000;

/** What became of the events. `unsent` are still on their way; `refused` and `dropped` never left. */
export interface Counts {
  published: number;
  /** Too large, no JSON, or not to be stored: sending it again cannot help. */
  refused: number;
  /** The queue and the spool were full, or the recorder closed. */
  dropped: number;
  /** With what an earlier process left in the spool. */
  unsent: number;
  /** Of the unsent: on disk. */
  spooled: number;
  lastError?: string;
}

export class Publisher {
  readonly counts: Counts = { published: 0, refused: 0, dropped: 0, unsent: 0, spooled: 0 };
  readonly #options: NodeConnectionOptions;
  readonly #queue: Waiting[] = [];
  readonly #closing = new AbortController();
  readonly #redaction: Redaction;
  #queueBytes = 0;
  #spool: Spool | undefined;
  #spoolIsOpen = false;
  #fromSpool: { window: Waiting[]; last: Spooled } | undefined; // what of the spool is being sent
  #said: string | undefined; // in the log, since something was stored
  #loop: Promise<void> | undefined;
  #end: Promise<number> | undefined;
  #connection: NatsConnection | undefined;

  constructor(
    readonly subject: string,
    options: NodeConnectionOptions,
    private readonly queueMax: number,
    private readonly log: (message: string) => void,
    redactor?: Redactor,
    spool?: Spool,
  ) {
    this.#redaction = new Redaction(redactor);
    this.#spool = spool;
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
    this.#start();
    return true;
  }

  refuse(why: string): false {
    this.counts.refused += 1;
    return this.#fault(why);
  }

  /** Wait until everything that was offered is acknowledged, at most `timeoutMs`. Gives how many events are not. */
  async flush(timeoutMs: number): Promise<number> {
    this.#start();
    const patience = new AbortController();
    const late = sleep(timeoutMs, undefined, { signal: patience.signal }).catch(() => undefined);
    await Promise.race([this.#loop, late]);
    patience.abort(); // a timer that is left would keep the process alive
    return this.counts.unsent;
  }

  /** Flush, then stop and disconnect, once. Gives how many events are not acknowledged; the spool keeps them. */
  close(timeoutMs: number): Promise<number> {
    this.#end ??= this.#close(timeoutMs);
    return this.#end;
  }

  async #close(timeoutMs: number): Promise<number> {
    await this.flush(timeoutMs);
    this.#closing.abort();
    await this.#connection?.close().catch(() => undefined);
    await this.#loop;
    await this.#setAside();
    await this.#spool?.close();
    const { unsent, spooled, lastError } = this.counts;
    const kept = this.#spool ? `; ${spooled} of them wait in ${this.#spool.directory}` : "";
    if (unsent) this.log(`ratchet: closed with ${unsent} events unsent${kept}; the last error was: ${lastError}`);
    return unsent;
  }

  #start(): void {
    if (!this.#closing.signal.aborted) this.#loop ??= this.#run();
  }

  async #run(): Promise<void> {
    await this.#findSpooled(); // this gives way at least once: `#loop` is set before it is unset below
    let pauseMs = MIN_PAUSE_MS;
    while ((this.#queue.length > 0 || this.counts.spooled > 0) && !this.#closing.signal.aborted) {
      try {
        const js = await this.#connected();
        await (this.counts.spooled > 0 ? this.#sendSpooled(js) : this.#sendQueued(js));
        this.#said = undefined;
        pauseMs = MIN_PAUSE_MS;
      } catch (error) {
        this.#fault(`the broker did not take an event yet: ${words(error)}`);
        if (this.#connection === undefined || this.#connection.isClosed()) await this.#setAside();
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
  async #sendQueued(js: JetStreamClient): Promise<void> {
    const window = this.#nextWindow();
    const results = await this.#publish(js, window);
    // What is not stored yet is first of the next window, under the same id.
    this.#takeFromQueue(window.length, window.filter((_, place) => isForLater(results[place]!)));
    results.filter((result) => !isForLater(result)).forEach((result) => this.#settle(result));
    throwFirst(results);
  }

  /** Publish the oldest window of the spool. It is done with as a whole, or sent again as a whole. */
  async #sendSpooled(js: JetStreamClient): Promise<void> {
    const spool = this.#spool!;
    this.#fromSpool ??= await this.#readSpool(spool);
    if (this.#fromSpool === undefined) return this.#lose(spool);
    const results = await this.#publish(js, this.#fromSpool.window);
    throwFirst(results);
    await spool.done(this.#fromSpool.last, results.length);
    this.#fromSpool = undefined;
    this.counts.spooled = spool.pending;
    results.forEach((result) => this.#settle(result));
  }

  async #readSpool(spool: Spool): Promise<{ window: Waiting[]; last: Spooled } | undefined> {
    const events = await spool.read(IN_FLIGHT, IN_FLIGHT_BYTES);
    const last = events.at(-1);
    return last && { window: events.map(ofSpool), last };
  }

  /** Somebody took the files away. */
  async #lose(spool: Spool): Promise<void> {
    this.#fault(`${spool.pending} events were in ${spool.directory} and are not there any more`);
    this.counts.unsent -= spool.pending;
    this.counts.dropped += spool.pending;
    this.counts.spooled = 0;
    await spool.forget();
  }

  /** What became of each: stored, or why it is not. */
  async #publish(js: JetStreamClient, window: Waiting[]): Promise<PromiseSettledResult<void>[]> {
    const ready = await Promise.allSettled(window.map((item) => this.#pack(item)));
    return Promise.allSettled(
      ready.map(async (result, place) => {
        if (result.status === "rejected") throw result.reason;
        await send(js, this.subject, window[place]!);
      }),
    );
  }

  /** Count what is done with: stored, or refused for good. */
  #settle(result: PromiseSettledResult<void>): void {
    this.counts.unsent -= 1;
    if (result.status === "fulfilled") this.counts.published += 1;
    else this.refuse(`an event was refused: ${words(result.reason)}`);
  }

  /** The `count` oldest, but for those that go back to their place. */
  #takeFromQueue(count: number, back: Waiting[] = []): void {
    for (const item of this.#queue.splice(0, count, ...back)) this.#queueBytes -= item.sizeBytes;
    for (const item of back) this.#queueBytes += item.sizeBytes;
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
    try {
      const data = new TextEncoder().encode(this.#redaction.of(item.json));
      item.zipped = data.length > GZIP_ABOVE_BYTES;
      item.data = item.zipped ? await promisify(gzip)(data, { level: 1 }) : data;
      item.json = "";
    } catch (error) {
      throw new NotWritableError(`its redactor threw ${words(error)}`);
    }
  }

  /** What an earlier process left is sent before anything else. */
  async #findSpooled(): Promise<void> {
    if (this.#spool && existsSync(this.#spool.directory)) await this.#openSpool(this.#spool);
  }

  /** Take the spool, with what it holds. Where it cannot be had, there is none. */
  async #openSpool(spool: Spool): Promise<void> {
    if (this.#spoolIsOpen) return;
    try {
      await spool.open();
    } catch (error) {
      this.#fault(`nothing is kept on disk while the broker is away: ${words(error)}`);
      this.#spool = undefined;
      return spool.close();
    }
    this.#spoolIsOpen = true;
    if (spool.damaged) this.#fault(`${spool.damaged} bytes in ${spool.directory} were damaged and left out`);
    this.counts.spooled = spool.pending;
    this.counts.unsent += spool.pending;
  }

  /** Move the queue to disk. */
  async #setAside(): Promise<void> {
    if (this.#spool && this.#queue.length > 0) await this.#openSpool(this.#spool);
    while (this.#spool && this.#queue.length > 0) {
      const window = this.#nextWindow();
      const packed = await Promise.allSettled(window.map((item) => this.#pack(item)));
      const ready = window.filter((_, place) => packed[place]!.status === "fulfilled");
      packed.filter((result) => result.status === "rejected").forEach((result) => this.#settle(result));
      const kept = await this.#keep(this.#spool, ready);
      this.#takeFromQueue(window.length, ready.slice(kept));
      if (kept < ready.length) return; // the oldest are on disk; the queue holds what it can, and then refuses
    }
  }

  /** Gives how many of them are on disk now. */
  async #keep(spool: Spool, ready: Waiting[]): Promise<number> {
    try {
      const kept = await spool.append(ready.map(forSpool));
      this.counts.spooled = spool.pending;
      if (kept < ready.length) this.#fault(`${spool.directory} is full: ${spool.pending} events wait there`);
      return kept;
    } catch (error) {
      this.#fault(`${spool.directory} takes no events: ${words(error)}`);
      return 0;
    }
  }

  #fault(why: string): false {
    if (why !== this.#said) this.log(`ratchet: ${why}`);
    this.#said = this.counts.lastError = why;
    return false;
  }
}
