/** The recorder without a broker. What it does with one is in tests/sdk/test_typescript.py. */

import assert from "node:assert/strict";
import { mkdtempSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";

import { connectionOptions } from "./connection.js";
import { Recorder } from "./recorder.js";
import { Redaction } from "./redact.js";
import { uuid7 } from "./values.js";

const NOBODY = "nats://127.0.0.1:1";

test("ids are UUIDv7 and follow time", async () => {
  const [first, second] = [uuid7(), await new Promise<string>((give) => setTimeout(() => give(uuid7()), 2))];
  assert.match(first, /^[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/);
  assert.ok(first < second);
  assert.ok(Math.abs(parseInt(first.replace("-", "").slice(0, 12), 16) - Date.now()) < 60_000);
});

test("user, password and TLS are taken out of the URL", () => {
  assert.deepEqual(connectionOptions("nats://me:p%40ss@127.0.0.1:4222,tls://two:4223"), {
    servers: ["127.0.0.1:4222", "two:4223"],
    tls: {},
    user: "me",
    pass: "p@ss",
  });
  assert.deepEqual(connectionOptions("localhost:4222"), { servers: ["localhost:4222"] });
});

test("credentials are a seed or a JWT user's file, and nothing else", () => {
  const file = join(mkdtempSync(join(tmpdir(), "ratchet-")), "agent.creds");
  const read = (text: string) => {
    writeFileSync(file, text);
    const { user, authenticator } = connectionOptions("nats://me:password@127.0.0.1:1", file);
    assert.equal(user, undefined);
    return authenticator;
  };
  const seed = `SU${"A".repeat(56)}`;
  assert.equal(typeof read(`${seed}\n`), "function");
  const jwt = "-----BEGIN NATS USER JWT-----\nj\n------END NATS USER JWT------\n";
  assert.equal(
    typeof read(`${jwt}-----BEGIN USER NKEY SEED-----\n${seed}\n------END USER NKEY SEED------\n`),
    "function",
  );
  assert.throws(() => read("secret"), /neither/);
});

test("what cannot be recorded is refused, and throws nothing", async () => {
  const said: string[] = [];
  const recorder = new Recorder(NOBODY, "agent-1", { spoolDir: "", log: (message) => said.push(message) });
  const circular: Record<string, unknown> = {};
  circular.self = circular;
  const trajectory = recorder.trajectory({ metadata: circular });
  const step = trajectory.step(circular);
  step.providerAccess("p", { data: circular });
  step.llmCall({ messages: [circular] });
  step.action("buy", { parameters: circular });
  step.reward(Number.NaN);
  step.end();
  step.end();
  trajectory.end("completed", { final: circular });
  trajectory.end();
  assert.equal(recorder.counts.refused, 7);
  assert.equal(recorder.counts.unsent, 3);
  assert.equal(await recorder.close(50), 3);
  assert.ok(
    said.some((message) => message.includes("3 events unsent")),
    said.join("\n"),
  );
});

test("an event that is too large is refused, and a full queue drops", async () => {
  const recorder = new Recorder(NOBODY, "agent-1", { spoolDir: "", queueMax: 2, log: () => undefined });
  const trajectory = recorder.trajectory();
  const step = trajectory.step({ data: "x".repeat(5_000_000) });
  step.end();
  assert.equal(recorder.counts.refused, 1);
  trajectory.step().end();
  trajectory.end();
  assert.equal(recorder.counts.dropped, 1);
  assert.equal(await recorder.flush(50), 2);
  assert.equal(await recorder.close(0), 2);
  assert.equal(await recorder.close(0), 2);
  recorder.trajectory();
  assert.equal(recorder.counts.dropped, 2);
});

test("a redactor sees every text, in its order, and its fault is not the agent's", () => {
  const redaction = new Redaction((text) => {
    if (text === "boom") throw new Error("no");
    return text.replace("secret", "[mine]");
  });
  const clean = redaction.of('{"kind":"secret","a":{"secret":["a secret",1]}}');
  assert.equal(clean, '{"kind":"secret","a":{"[mine]":["a [mine]",1]}}');
  assert.throws(() => redaction.of('{"a":"boom"}'));
  assert.equal(new Redaction(undefined).of('{"a":"sk-proj-0123456789abcdef"}'), '{"a":"sk-proj-0123456789abcdef"}');
});

test("an agent id must fit into a subject", () => {
  assert.throws(() => new Recorder(NOBODY, "a.b"), RangeError);
});

/** Never run: each marked line must be refused by the compiler, which says so where one is not. */
export function wrong(recorder: Recorder): void {
  // @ts-expect-error a misspelled field
  const trajectory = recorder.trajectory({ scenario: "sunny" });
  const step = trajectory.step();
  // @ts-expect-error a field of another type
  step.llmCall({ messages: [], temperature: "hot" });
  // @ts-expect-error a purpose that does not exist
  step.llmCall({ messages: [], purpose: "fun" });
  // @ts-expect-error success is true or false
  step.action("buy", { success: "yes" });
  // @ts-expect-error a reward is a number
  step.reward("much");
  // @ts-expect-error a status that does not exist
  trajectory.end("won");
}
