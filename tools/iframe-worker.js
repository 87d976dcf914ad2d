// Opened as a file, a page may start no worker, and the search of the site runs in one: there it runs in a hidden frame.
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      const inner = this.frame.contentWindow
      inner.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      inner.importScripts = (...urls) => urls.reduce((before, one) => before.then(() => load(inner, one)), Promise.resolve())
      this.loaded = load(inner, url)
    }
    postMessage(data) {
      this.loaded.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })))
    }
    terminate() { this.frame.remove() }
  }
  const load = (inner, url) => new Promise((done, failed) => {
    const script = inner.document.createElement("script")
    Object.assign(script, { src: url, onload: done, onerror: failed })
    inner.document.head.append(script)
  })
}
