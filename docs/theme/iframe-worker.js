// A page that is opened from disk may start no worker. Search needs one: here it runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.onmessage = null
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.appendChild(this.frame)
      const inner = this.frame.contentWindow
      this.ready = new Promise((resolve) => { this.frame.onload = resolve })
      this.hear = (event) => {
        if (event.source !== inner) return
        event.stopImmediatePropagation()
        const message = new MessageEvent("message", {data: event.data})
        this.dispatchEvent(message)
        if (typeof this.onmessage === "function") this.onmessage(message)
      }
      window.addEventListener("message", this.hear)
      const page = inner.document
      page.open()
      page.write("<!doctype html><script>postMessage = (data) => parent.postMessage(data, '*')</" + "script>")
      page.write("<script src='" + encodeURI(url).replaceAll("'", "%27") + "'></" + "script>")
      page.close()
    }

    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", {data})))
    }

    terminate() {
      window.removeEventListener("message", this.hear)
      this.frame.remove()
    }
  }
}
