/** One recorded run: `RATCHET_NATS_URL=nats://user:password@host:port npm start -- AGENT_ID [TRAJECTORY_ID]`. */

import { Recorder } from "./recorder.js";

const { RATCHET_NATS_URL: natsUrl, RATCHET_AGENT_ID, RATCHET_CREDENTIALS: credentials } = process.env;
const [agentId = RATCHET_AGENT_ID, trajectory_id] = process.argv.slice(2);
if (!natsUrl || !agentId) {
  console.error("usage: RATCHET_NATS_URL=nats://user:password@host:port npm start -- AGENT_ID [TRAJECTORY_ID]");
  process.exit(2);
}

const recorder = new Recorder(natsUrl, agentId, { credentials });
const trajectory = recorder.trajectory({
  trajectory_id,
  scenario_id: "sunny",
  goal: "win",
  metadata: { batch: 7 },
});
try {
  const step = trajectory.step({ balance: 100 });
  step.providerAccess("prices", { query: { of: "iron" }, purpose: "decide", data: { iron: 3 } });
  step.llmCall({
    messages: [
      { role: "system", content: "trade" },
      { role: "user", content: "now?" },
    ],
    response: "buy", // what a model would have said; a whole chat completion goes in as it is
    model: "m",
    purpose: "reasoning",
    usage: { prompt_tokens: 3 },
  });
  step.action("buy", { parameters: { of: "iron" }, success: true, result: { order: 1 }, reasoning: "cheap" });
  step.reward(0.5);
  step.end();
  const next = trajectory.step({ balance: 90 });
  next.llmCall({
    messages: [
      { role: "system", content: "trade" },
      { role: "user", content: "now?" },
      { role: "assistant", content: "buy" }, // the call before, to its end: only what follows is sent
      { role: "user", content: "and now?" },
    ],
    response: "sell",
    model: "m",
    purpose: "action",
    usage: { prompt_tokens: 9 },
  });
  next.action("sell", { parameters: { of: "iron" }, success: false, error: "nobody buys" });
  next.end();
  trajectory.end("completed", { final: { balance: 101 }, metrics: { trades: 1 } });
} catch (error) {
  trajectory.end("failed", { error: String(error) });
  throw error;
} finally {
  if ((await recorder.close()) > 0) process.exitCode = 1;
}
