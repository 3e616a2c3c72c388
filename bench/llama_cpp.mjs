// One run of llama.cpp for bench/speed.py: node llama_cpp.mjs MODEL.gguf THREADS NEW < ids.json
// The package node-llama-cpp is looked for in the folder this runs in: npm install node-llama-cpp
import fs from "node:fs";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const [path, threads, nNew] = [process.argv[2], Number(process.argv[3]), Number(process.argv[4])];
const here = createRequire(process.cwd() + "/");
let library;
try {
    library = await import(pathToFileURL(here.resolve("node-llama-cpp")));
} catch (error) {
    console.error(`Error: node-llama-cpp is not installed here; npm install node-llama-cpp (${error.code})`);
    process.exit(2);
}
const ids = JSON.parse(fs.readFileSync(0, "utf8"));
const llama = await library.getLlama({gpu: false, build: "never", maxThreads: threads, logLevel: "error"});
const model = await llama.loadModel({modelPath: path});
const context = await model.createContext({
    contextSize: ids.length + nNew + 8, threads, batchSize: 512, flashAttention: process.env.FA === "1"
});
const sequence = context.getSequence();
const answer = [];
const times = [performance.now()];
for await (const token of sequence.evaluate(ids, {temperature: 0, yieldEogToken: true})) {
    answer.push(token);
    times.push(performance.now());
    if (answer.length === nNew) break;
}
const steps = times.slice(2).map((t, i) => [(t - times[i + 1]) / 1000, 1]);  // seconds, tokens
const status = fs.readFileSync("/proc/self/status", "utf8");
const peak = Number(status.match(/VmHWM:\s+(\d+)/)[1]) * 1024;
const first = (times[1] - times[0]) / 1000;
console.log(JSON.stringify({first_s: first, steps, answer, peak_bytes: peak}));
process.exit(0);
