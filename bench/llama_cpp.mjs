// One run of llama.cpp for bench/speed.py: node llama_cpp.mjs MODEL.gguf THREADS NEW < ids.json
import fs from "node:fs";
import {getLlama} from "node-llama-cpp";

const [path, threads, nNew] = [process.argv[2], Number(process.argv[3]), Number(process.argv[4])];
const ids = JSON.parse(fs.readFileSync(0, "utf8"));
const llama = await getLlama({gpu: false, build: "never", maxThreads: threads, logLevel: "error"});
const model = await llama.loadModel({modelPath: path});
const context = await model.createContext({contextSize: ids.length + nNew + 8, threads, batchSize: 512});
const sequence = context.getSequence();
const times = [performance.now()];
for await (const token of sequence.evaluate(ids, {temperature: 0, yieldEogToken: true})) {
    times.push(performance.now());
    if (times.length > nNew + 1) break;
}
const steps = times.slice(2).map((t, i) => (t - times[i + 1]) / 1000);
const peak = Number(fs.readFileSync("/proc/self/status", "utf8").match(/VmHWM:\s+(\d+)/)[1]) * 1024;
console.log(JSON.stringify({first_s: (times[1] - times[0]) / 1000, steps_s: steps, peak_bytes: peak}));
process.exit(0);
