/* Pages opened from a file may not start workers. There, the site's search runs in a hidden frame instead. */
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.appendChild(frame);
      const inside = frame.contentWindow;
      this.inside = inside;
      this.frame = frame;
      inside.document.open();
      inside.document.write(`<body><script src="${url}"><\/script></body>`);
      this.ready = new Promise((resolve) => inside.addEventListener("load", resolve)); // `open` removes listeners
      inside.postMessage = (data) => {
        const event = new MessageEvent("message", { data });
        this.dispatchEvent(event);
        if (this.onmessage) this.onmessage(event);
      };
      inside.importScripts = (...sources) =>
        sources.reduce(
          (before, source) =>
            before.then(
              () =>
                new Promise((resolve, reject) => {
                  const script = inside.document.createElement("script");
                  script.src = new URL(source, url);
                  script.onload = resolve;
                  script.onerror = reject;
                  inside.document.body.appendChild(script);
                }),
            ),
          Promise.resolve(),
        );
      inside.document.close();
    }
    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
