/** The spool, and a publisher that has no broker. With one, and beside the Python SDK: tests/sdk/test_typescript_spool.py. */

import assert from "node:assert/strict";
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { open } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { mock, test } from "node:test";

import { Publisher } from "./publisher.js";
import { Recorder } from "./recorder.js";
import { Spool, type Packed } from "./spool.js";

const NOBODY = { servers: ["127.0.0.1:1"] };
const ALL = 1e9;

function place(): string {
  return mkdtempSync(join(tmpdir(), "ratchet-"));
}

async function opened(directory: string, ...limits: number[]): Promise<Spool> {
  const spool = new Spool(directory, ...limits);
  await spool.open();
  return spool;
}

function events(...numbers: number[]): Packed[] {
  return numbers.map((n) => ({ id: `a:${n}`, data: Buffer.from(`event ${n} \0 end`), flags: n % 4 }));
}

async function told(spool: Spool): Promise<Packed[]> {
  return (await spool.read(ALL, ALL)).map(({ id, data, flags }) => ({ id, data: Buffer.from(data), flags }));
}

async function finish(spool: Spool, many: number): Promise<void> {
  const window = await spool.read(many, ALL);
  await spool.done(window.at(-1)!, window.length);
}

function segments(directory: string): string[] {
  return readdirSync(directory).filter((name) => name.endsWith(".events"));
}

/** A spool that was closed with three events of the same size in one file: the file, and what is in it. */
async function three(): Promise<{ home: string; file: string; data: Buffer; size: number }> {
  const home = place();
  const spool = await opened(home);
  await spool.append(events(1, 2, 3));
  await spool.close();
  const file = join(home, segments(home)[0]!);
  const data = readFileSync(file);
  assert.equal(data.length % 3, 0);
  return { home, file, data, size: data.length / 3 };
}

test("what is kept is read in order, by the next process too", async () => {
  const home = place();
  const spool = await opened(home);
  assert.equal(await spool.append(events(1, 2, 3)), 3);
  assert.equal(await spool.append(events(4)), 1);
  await finish(spool, 2);
  assert.deepEqual(await told(spool), events(3, 4));
  await spool.close();
  const again = await opened(home);
  assert.deepEqual([again.pending, again.damaged], [2, 0]);
  await again.append(events(5));
  assert.deepEqual(await told(again), events(3, 4, 5));
  await finish(again, 3);
  assert.deepEqual([again.pending, segments(home)], [0, []]);
  await again.append(events(6));
  assert.deepEqual(await told(again), events(6));
  await again.close();
});

test("any sequence keeps a queue, over segments of a few events", async () => {
  const home = place();
  let spool = await opened(home, ALL, 100);
  let [expected, number] = [[] as Packed[], 0];
  const moves = [3, -1, 9, 0, -4, 2, -9, 0, 1, -1, 5, 5, -2, 0, -8, 7];
  for (const move of moves) {
    if (move > 0) {
      const added = events(...Array.from({ length: move }, () => number++));
      assert.equal(await spool.append(added), move);
      expected.push(...added);
    } else if (move < 0) {
      await finish(spool, -move);
      expected = expected.slice(-move);
    } else {
      await spool.close();
      spool = await opened(home, ALL, 100);
    }
    assert.deepEqual(await told(spool), expected);
    assert.equal(spool.pending, expected.length);
  }
  await spool.close();
});

test("each process has its own, and a later one finds what is left", async () => {
  const home = join(place(), "agent-1");
  const spools: Spool[] = [];
  for (let n = 0; n < 8; n++) spools.push(await opened(home));
  assert.equal(new Set(spools.map((spool) => spool.directory)).size, 8);
  await assert.rejects(opened(home), /in use by other processes/);
  await spools[3]!.append(events(1, 2));
  for (const spool of spools) await spool.close();
  const later = await opened(home);
  assert.equal(later.directory, spools[3]!.directory);
  assert.deepEqual(await told(later), events(1, 2));
  const last = await opened(home);
  assert.equal(last.directory, home);
  await later.close();
  await last.close();
});

test("it is bounded and keeps the oldest", async () => {
  const { size } = await three();
  const spool = await opened(place(), 3 * size);
  assert.equal(await spool.append(events(1, 2, 3, 4, 5)), 3);
  assert.equal(await spool.append(events(6)), 0);
  assert.deepEqual(await told(spool), events(1, 2, 3));
  await finish(spool, 3);
  assert.equal(await spool.append(events(7)), 1);
  await spool.close();
});

test("what a crash cut off is left out, and nothing else", async () => {
  const { home, file, data, size } = await three();
  for (let left = 0; left < data.length; left++) {
    writeFileSync(file, data);
    truncateSync(file, left);
    const spool = await opened(home);
    const whole = Math.floor(left / size);
    assert.deepEqual(await told(spool), events(1, 2, 3).slice(0, whole));
    assert.deepEqual([spool.pending, spool.damaged], [whole, left % size]);
    await spool.close();
  }
});

test("a flipped bit costs the event that it is in, and no other; so does a hole of zeros", async () => {
  const { home, file, data, size } = await three();
  const faults = Array.from({ length: size }, (_, n) => (torn: Buffer) => void (torn[size + n]! ^= 4));
  faults.push((torn) => void torn.fill(0, size + 4, 2 * size)); // a mark, and then what a disk gives that forgot
  for (const fault of faults) {
    const torn = Buffer.from(data);
    fault(torn);
    writeFileSync(file, torn);
    rmSync(join(home, "position"), { force: true });
    const spool = await opened(home);
    assert.deepEqual(await told(spool), events(1, 3));
    assert.deepEqual([spool.pending, spool.damaged], [2, size]);
    await finish(spool, 1);
    assert.deepEqual(await told(spool), events(3));
    await spool.close();
  }
});

test("a disk that refuses leaves what was there", async () => {
  const home = place();
  const spool = await opened(home);
  await spool.append(events(1));
  const file = await open(join(home, "any"), "w");
  const refused = mock.method(Object.getPrototypeOf(file), "sync", () => Promise.reject(new Error("No space left")));
  await assert.rejects(spool.append(events(2, 3)), /No space left/);
  refused.mock.restore();
  await file.close();
  assert.equal(spool.pending, 1);
  assert.deepEqual(await told(spool), events(1));
  await spool.append(events(4));
  await spool.close();
  const again = await opened(home);
  assert.deepEqual(await told(again), events(1, 4));
  await again.close();
});

test("a position that cannot be written counts nothing twice", async () => {
  const home = place();
  const spool = await opened(home);
  await spool.append(events(1, 2, 3, 4));
  mkdirSync(join(home, "position.new")); // as unwritable as on a full disk
  await finish(spool, 2);
  assert.deepEqual([spool.pending, await told(spool)], [2, events(3, 4)]);
  await spool.close();
  const again = await opened(home);
  assert.deepEqual(await told(again), events(1, 2, 3, 4)); // the position lies behind: sent again, stored once
  await again.close();
});

test("files that somebody took away are forgotten, and the next event begins a new one", async () => {
  const home = place();
  const spool = await opened(home);
  await spool.append(events(1, 2));
  rmSync(join(home, segments(home)[0]!));
  assert.deepEqual(await told(spool), []);
  await spool.forget();
  assert.equal(await spool.append(events(3)), 1);
  assert.deepEqual([spool.pending, await told(spool)], [1, events(3)]);
  await spool.close();
});

test("what ends while the broker is away is on disk, without secrets; closing twice is closing once", async () => {
  const spoolDir = place();
  const said: string[] = [];
  const recorder = new Recorder("nats://127.0.0.1:1", "agent-1", { spoolDir, log: (message) => said.push(message) });
  const trajectory = recorder.trajectory({ goal: `use sk-${"a".repeat(30)}` });
  while (recorder.counts.spooled < 1) await new Promise((next) => setImmediate(next));
  trajectory.end(); // in the queue as it closes
  assert.deepEqual(await Promise.all([recorder.close(0), recorder.close(0)]), [2, 2]);
  assert.deepEqual([recorder.counts.unsent, recorder.counts.spooled], [2, 2]);
  const home = join(spoolDir, "agent-1");
  assert.ok(said.at(-1)!.includes(`closed with 2 events unsent; 2 of them wait in ${home};`), said.at(-1));
  const kept = await opened(home);
  const texts = (await told(kept)).map(({ data }) => JSON.parse(Buffer.from(data).toString()));
  assert.deepEqual([texts[0].goal, texts[1].kind], ["use [key]", "trajectory.ended"]);
  await kept.close();
});

test("an event that cannot be redacted does not get to the disk, and costs no other", async () => {
  const spoolDir = place();
  const redact = (text: string) => {
    if (text === "boom") throw new Error("no");
    return text;
  };
  const recorder = new Recorder("nats://127.0.0.1:1", "agent-1", { spoolDir, redact, log: () => undefined });
  recorder.trajectory({ goal: "boom" }).end();
  assert.equal(await recorder.close(0), 1);
  assert.deepEqual([recorder.counts.refused, recorder.counts.spooled], [1, 1]);
});

test("without a place for it there is no spool and no harm", async () => {
  const spoolDir = join(place(), "file");
  writeFileSync(spoolDir, "");
  const said: string[] = [];
  const recorder = new Recorder("nats://127.0.0.1:1", "agent-1", { spoolDir, log: (message) => said.push(message) });
  recorder.trajectory().end();
  assert.equal(await recorder.close(0), 2);
  assert.equal(recorder.counts.spooled, 0);
  assert.ok(said.some((message) => message.includes("nothing is kept on disk")));
});

test("without flock(1) there is no spool, and the log says so", async (context) => {
  const spoolDir = place();
  const path = process.env.PATH;
  process.env.PATH = place();
  context.after(() => (process.env.PATH = path));
  const said: string[] = [];
  const recorder = new Recorder("nats://127.0.0.1:1", "agent-1", { spoolDir, log: (message) => said.push(message) });
  recorder.trajectory().end();
  assert.equal(await recorder.close(0), 2);
  assert.deepEqual([recorder.counts.spooled, segments(join(spoolDir, "agent-1"))], [0, []]);
  assert.ok(said.some((message) => message.includes("flock(1) must be installed")));
});

test("an empty name for its place means none", async () => {
  const recorder = new Recorder("nats://127.0.0.1:1", "agent-1", { spoolDir: "", log: () => undefined });
  recorder.trajectory().end();
  assert.equal(await recorder.close(0), 2);
  assert.equal(recorder.counts.spooled, 0);
  assert.equal(existsSync(".ratchet"), false);
});

test("a full spool keeps the oldest, and a full queue behind it drops and counts", async () => {
  const home = place();
  const publisher = new Publisher("steps.a", NOBODY, 10, () => undefined, undefined, new Spool(home, 2_100));
  const offer = (n: number) => publisher.offer(`a:${n}`, "x".repeat(150)); // a record of 168 or 169 bytes
  for (let n = 0; n < 10; n++) offer(n);
  while (publisher.counts.spooled < 10) await new Promise((next) => setImmediate(next));
  for (let n = 10; n < 20; n++) offer(n);
  while (publisher.counts.spooled < 12) await new Promise((next) => setImmediate(next));
  assert.deepEqual([20, 21, 22, 23].map(offer), [true, true, false, false]);
  await publisher.close(0);
  const { spooled, unsent, dropped } = publisher.counts;
  assert.deepEqual([spooled, unsent, dropped], [12, 22, 2]);
  const kept = await opened(home);
  assert.deepEqual(
    (await told(kept)).map(({ id }) => id),
    Array.from({ length: 12 }, (_, n) => `a:${n}`),
  );
  await kept.close();
});
