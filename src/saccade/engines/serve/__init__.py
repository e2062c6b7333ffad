"""An HTTP endpoint that speaks OpenAI's language, over a model with methods attached.

`service` owns the model: one thread reads prompts and decodes all running requests together. `app` is the HTTP side,
`protocol` the words on the wire. The extra `serve` brings Starlette and uvicorn.
"""
