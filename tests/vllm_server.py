"""The endpoints of a vLLM server that TRL's client uses, on a CPU: ``python vllm_server.py MODEL PORT``.

It answers with transformers, at a temperature that is a little too high: so its log-probs differ from the trainer's, as
a real server's do, and the importance correction has something to correct. A real server receives weights over NCCL,
which needs GPUs; this one reads them from the file that ``update_weights`` names.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

TOO_WARM = 1.02
INFO = {
    "vllm_config": {
        "weight_transfer_config": {"backend": "file"},
        "model_config": {"logprobs_mode": "processed_logprobs"},
    }
}


@torch.no_grad()
def complete(model, prompt: list[int], wanted: dict, seed: int) -> list[dict]:
    """``wanted["n"]`` choices for a prompt, token by token; log-probs after the temperature."""
    torch.manual_seed(seed)
    end = model.generation_config.eos_token_id
    choices = []
    for _ in range(wanted["n"]):
        ids, logprobs = [], []
        while len(ids) < wanted["max_tokens"] and (not ids or ids[-1] != end):
            logits = model(torch.tensor([prompt + ids])).logits[0, -1] / (TOO_WARM * wanted["temperature"])
            logp = logits.log_softmax(-1)
            ids.append(int(torch.multinomial(logp.exp(), 1)))
            logprobs.append(float(logp[ids[-1]]))
        names = [f"token_id:{one}" for one in ids]
        choices.append(
            {
                "prompt_token_ids": prompt,
                "token_ids": ids,
                "logprobs": {"tokens": names, "token_logprobs": logprobs, "top_logprobs": [None] * len(ids)},
            }
        )
    return choices


class Handler(BaseHTTPRequestHandler):
    model, name, calls = None, "", 0

    def answer(self, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        models = {"data": [{"id": self.name}]}
        self.answer(
            {"/health": {}, "/v1/models": models, "/server_info": INFO, "/get_world_size": {"world_size": 1}}[path]
        )

    def do_POST(self) -> None:
        wanted = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        if self.path == "/v1/completions":
            type(self).calls += 1
            prompts = list(enumerate(wanted["prompt"]))
            found = [complete(self.model, prompt, wanted, 1000 * self.calls + row) for row, prompt in prompts]
            return self.answer({"choices": [choice for choices in found for choice in choices]})
        if self.path == "/update_weights":
            self.model.load_state_dict(load_file(wanted["update_info"]["file"]), strict=False)
        return self.answer({"success": True})

    def log_message(self, *_) -> None:
        pass


if __name__ == "__main__":
    Handler.name = sys.argv[1]
    Handler.model = AutoModelForCausalLM.from_pretrained(Handler.name, dtype=torch.float32).eval()
    HTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
