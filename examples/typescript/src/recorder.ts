/**
 * Records what an agent does: trajectories, their steps, and what came of them.
 *
 * Fields have the names of the wire contract (docs/events.md), from which their types are generated. What is given is copied
 * at once, and nothing throws into the agent: what cannot be recorded is counted and said in the log.
 */

import { resolve } from "node:path";

import { NUMBERS, begins, replyFields, type Conversation, type Message } from "./calls.js";
import { connectionOptions } from "./connection.js";
import type * as wire from "./events.js";
import { Publisher, type Counts } from "./publisher.js";
import { secrets, type Redactor } from "./redact.js";
import { Spool } from "./spool.js";
import { encoded, uuid7, words } from "./values.js";

type Json = Record<string, unknown>;
type Head = "schema" | "event_id" | "policy" | "trajectory_id" | "started_at" | "occurred_at";
type Body<E> = E extends unknown ? Omit<E, Head> : never;
export type Status = wire.TrajectoryEnded["status"];

export interface RecorderOptions {
  policy?: string;
  /** A file with a NATS user's credentials or nkey seed, instead of a user and password in the URL. */
  credentials?: string;
  queueMax?: number;
  /** Takes secrets out of each text before it leaves: keys, tokens, passwords, addresses, card numbers; null: nothing. */
  redact?: Redactor | null;
  /** Where events wait on disk while the broker is away: RATCHET_SPOOL_DIR or `.ratchet/spool`; nowhere if it is empty. */
  spoolDir?: string;
  log?: (message: string) => void;
}

/** `model` is the policy's name where the gateway routes the run, else what the agent acts with. */
export type Opening = Partial<
  Pick<wire.TrajectoryStarted, "trajectory_id" | "started_at" | "scenario_id" | "goal" | "model" | "metadata" | "expects">
>;

/** `response` is the reply's text, an OpenAI choice, or a whole chat completion. Without an id the call gets one. */
export type Call = Omit<wire.LlmCall, "call_id" | "messages" | "response"> & {
  call_id?: string;
  messages: readonly object[];
  response?: string | object;
};

/** State at the end (balance, profit, ...) as the agent sees it, its metrics, and why it failed. */
export type Ending = Pick<wire.TrajectoryEnded, "final" | "metrics"> & { error?: string };

/** Throws for an agent id that no subject can hold, an address that is none, and credentials that cannot be read. */
export class Recorder {
  readonly policy: string;
  readonly #publisher: Publisher;

  constructor(
    natsUrl: string,
    readonly agentId: string,
    options: RecorderOptions = {},
  ) {
    if (!/^[A-Za-z0-9_-]{1,64}$/.test(agentId)) {
      throw new RangeError(`agentId must be 1 to 64 of A-Z a-z 0-9 _ -, got ${JSON.stringify(agentId)}`);
    }
    this.policy = options.policy ?? "default";
    const spoolDir = options.spoolDir ?? process.env.RATCHET_SPOOL_DIR ?? ".ratchet/spool";
    this.#publisher = new Publisher(
      `steps.${agentId}`,
      { ...connectionOptions(natsUrl, options.credentials), name: agentId, inboxPrefix: `_INBOX_${agentId}` },
      options.queueMax ?? 10_000,
      options.log ?? console.warn,
      options.redact === null ? undefined : (options.redact ?? secrets),
      spoolDir ? new Spool(resolve(spoolDir, agentId)) : undefined,
    );
  }

  /** A run, which begins now. */
  trajectory(opening: Opening = {}): Trajectory {
    return new Trajectory(this, opening);
  }

  /** What became of the events up to now. */
  get counts(): Readonly<Counts> {
    return this.#publisher.counts;
  }

  /** Wait for the acks of what was recorded, at most `timeoutMs`. Gives how many events are unsent. */
  flush(timeoutMs = 10_000): Promise<number> {
    return this.#publisher.flush(timeoutMs);
  }

  /**
   * Flush and disconnect, without which the process does not end. Gives how many events are not acknowledged; what is
   * spooled (`counts.spooled`) goes next time.
   */
  close(timeoutMs = 10_000): Promise<number> {
    return this.#publisher.close(timeoutMs);
  }

  /** Queue an event as it is. False where it was refused or dropped. */
  record(event: wire.StepEvent): boolean {
    try {
      return this.#publisher.offer(`${this.agentId}:${event.event_id}`, encoded(event));
    } catch (error) {
      return this.refuse(`an event cannot be written as JSON: ${words(error)}`);
    }
  }

  /** Events that were recorded and will never be stored. */
  get lost(): number {
    return this.counts.refused + this.counts.dropped;
  }

  /** Count something that cannot be recorded, and say why in the log. Gives false. */
  refuse(why: string): false {
    return this.#publisher.refuse(why);
  }

  /** A copy as JSON can carry it. Where there is none it is counted as refused, and nothing is given. */
  copied<T>(value: T, what: string): T | undefined {
    try {
      return JSON.parse(encoded(value)) as T;
    } catch (error) {
      this.refuse(`${what} was not recorded: ${words(error)}`);
      return undefined;
    }
  }
}

export class Trajectory {
  readonly id: string;
  readonly startedAt: string;
  #steps = 0;
  #ended = false;
  #conversations: Conversation[] = [];
  readonly #namedCalls = new Map<string, string>(); // by the ids that the agent gave them

  constructor(
    readonly recorder: Recorder,
    opening: Opening,
  ) {
    const { trajectory_id, started_at, ...rest } = recorder.copied(opening, "a trajectory's opening") ?? {};
    this.id = trajectory_id ?? uuid7();
    this.startedAt = started_at ?? new Date().toISOString();
    this.emit({ kind: "trajectory.started", ...rest });
  }

  /** The next step; it is recorded when it ends. */
  step(environment: Json = {}): Step {
    return new Step(this, this.#steps++, this.recorder.copied(environment, "an environment") ?? {});
  }

  /** Record the end, once. */
  end(status: Status = "completed", ending: Ending = {}): void {
    if (this.#ended) return;
    this.#ended = true;
    const copy = this.recorder.copied(ending, "a trajectory's ending");
    this.emit({ kind: "trajectory.ended", status, step_count: this.#steps, ...copy });
  }

  /** The id that the agent gave a call, or one of ours where another call of this run bears it: it would hide this one. */
  callId(call: wire.LlmCall): string {
    const json = encoded(call);
    const known = this.#namedCalls.get(call.call_id);
    if (known === undefined) this.#namedCalls.set(call.call_id, json);
    if (known === undefined || known === json) return call.call_id;
    const own = uuid7();
    this.recorder.refuse(`a second call had the id ${call.call_id}: it is recorded as ${own}; give each its own`);
    return own;
  }

  /**
   * Of a call whose prompt begins with an earlier call's prompt and reply: what follows them, and that call's id. A long
   * run then costs its length once. Fields that are null count for nothing: clients send a reply back as they like. Once
   * an event was lost nothing before it is built upon.
   */
  extending(call: wire.LlmCall): wire.LlmCall {
    const { call_id, messages = [], response } = call;
    const sound = this.#conversations.filter((known) => known.lost === this.recorder.lost);
    const known = sound.reverse().find((known) => begins(known, messages));
    const reply = response?.message;
    if (reply && typeof reply === "object") {
      const after = { call_id, messages: [...messages, reply as Message], lost: this.recorder.lost };
      this.#conversations = [...this.#conversations.slice(1 - CONVERSATIONS), after];
    }
    return known ? { ...call, base_call_id: known.call_id, messages: messages.slice(known.messages.length) } : call;
  }

  /** Record one event of this run. */
  emit(body: Body<wire.StepEvent>): void {
    this.recorder.record({
      schema: 1,
      event_id: uuid7(),
      policy: this.recorder.policy,
      trajectory_id: this.id,
      started_at: this.startedAt,
      occurred_at: new Date().toISOString(),
      ...body,
    });
  }
}

export class Step {
  readonly #accesses: wire.ProviderAccess[] = [];
  readonly #calls: wire.LlmCall[] = [];
  #action: wire.Action | undefined;
  #reward: number | undefined;
  #ended = false;

  constructor(
    readonly trajectory: Trajectory,
    readonly number: number,
    private readonly environment: Json,
  ) {}

  /** What the agent looked up before it acted. */
  providerAccess(provider: string, access: Omit<wire.ProviderAccess, "provider"> = {}): void {
    this.#late("a provider access");
    const copy = this.trajectory.recorder.copied({ ...access, provider }, "a provider access");
    if (copy) this.#accesses.push(copy);
  }

  /**
   * A model call that no gateway saw. Gives its id: `call_id`, unless another call of the run has it. Of a prompt that extends an earlier call of the run only what is new is
   * sent, with `base_call_id`.
   */
  llmCall(call: Call): string {
    const call_id = call?.call_id ?? uuid7();
    const odd = NUMBERS.find((name) => typeof call?.[name] === "number" && !Number.isFinite(call[name]));
    if (odd) {
      this.trajectory.recorder.refuse(`a model call was not recorded: ${odd} must be a finite number`);
      return call_id;
    }
    const copy = this.trajectory.recorder.copied({ ...call, ...replyFields(call?.response), call_id }, "a model call");
    if (!copy) return call_id;
    const whole = copy as wire.LlmCall;
    if (call?.call_id !== undefined) whole.call_id = this.trajectory.callId(whole);
    this.#add(whole.base_call_id ? whole : this.trajectory.extending(whole));
    return whole.call_id;
  }

  /** A call that the gateway recorded, by its id: the reply's own, or the header X-Ratchet-Call-Id. */
  refer(call_id: string, more: Pick<wire.LlmCall, "purpose" | "action_type"> = {}): void {
    const copy = this.trajectory.recorder.copied({ ...more, call_id }, "a reference to a model call");
    if (copy) this.#add(copy);
  }

  /** What the agent did and what came of it; a second one in a step replaces the first. */
  action(type: string, more: Omit<wire.Action, "type"> = {}): void {
    this.#late("an action");
    this.#action = this.trajectory.recorder.copied({ ...more, type }, "an action") ?? this.#action;
  }

  /** The agent's own opinion of the step: kept, and never what is trained on. */
  reward(value: number): void {
    this.#late("a reward");
    if (Number.isFinite(value)) this.#reward = value;
    else this.trajectory.recorder.refuse("a reward was not recorded: it must be a finite number");
  }

  /** Record the step, once. */
  end(): void {
    if (this.#ended) return;
    this.#ended = true;
    this.trajectory.emit({
      kind: "step",
      step: this.number,
      environment: this.environment,
      provider_accesses: this.#accesses,
      llm_calls: this.#calls,
      action: this.#action,
      reward: this.#reward,
    });
  }

  #late(what: string): void {
    if (this.#ended) this.trajectory.recorder.refuse(`${what} was not recorded: its step is recorded already`);
  }

  #add(call: wire.LlmCall): void {
    if (this.#ended) this.trajectory.emit({ kind: "llm_call", step: this.number, call });
    else this.#calls.push(call);
  }
}

const CONVERSATIONS = 4; // of a run, that its next call may extend
